"""Gradients under ComfyUI's inference mode: right, free of side effects, and without a second copy of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.errors import RetraceError
from tests.rounding import assert_rounds_to, roundings

pytestmark = pytest.mark.rounding

SIGMA = 1.5


def plain(denoiser: Any, x: Any, conds: Any) -> Any:
    return denoiser.denoised(x, SIGMA, conds[0])


def directional(function: Any, point: torch.Tensor, direction: torch.Tensor, step: float) -> float:
    """The central difference of ``function`` along ``direction``."""
    with torch.no_grad():
        high, low = (float(function(point + s * direction).double()) for s in (step, -step))
    return (high - low) / (2 * step)


def test_gradients_to_latent_and_text_equal_finite_differences(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> None:
        weights, cond = torch.randn_like(x), conds[0]
        text = cond.embedding
        with denoiser.differentiable():
            y, e = x.clone().requires_grad_(), text.clone().requires_grad_()
            loss = (denoiser.denoised(y, SIGMA, cond.with_embedding(e)) * weights).sum()
            to_x, to_text = torch.autograd.grad(loss, (y, e))
        # Along the gradient itself the slope is largest, and rounding matters least.
        for point, gradient, function in (
            (x, to_x, lambda t: (denoiser.denoised(t, SIGMA, cond).double() * weights).sum()),
            (text, to_text, lambda t: (denoiser.denoised(x, SIGMA, cond.with_embedding(t)).double() * weights).sum()),
        ):
            direction = gradient / gradient.norm()
            slope = directional(function, point, direction, 0.02 * float(point.std()))
            assert float(gradient.norm()) > 0
            assert slope == pytest.approx(float(gradient.norm()), rel=0.02)

    subject.run(torch.randn(2, 4, 16, 16) * SIGMA, method, gradients=True)


def test_gradients_through_guidance_and_two_conditions(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            texts = [cond.embedding.clone().requires_grad_() for cond in conds]
            pairs = [cond.with_embedding(text) for cond, text in zip(conds, texts, strict=True)]
            uncond, cond = denoiser.denoised_each(x, SIGMA, pairs)
            return torch.autograd.grad(uncond.square().sum() + cond.square().sum(), texts)

    first, second = subject.run(torch.randn(1, 4, 16, 16), method, "", "a red circle", gradients=True)
    assert first.shape == second.shape == (1, 77, 64)
    assert float(first.abs().sum()) > 0 and float(second.abs().sum()) > 0


def test_gradient_through_the_decoder(subject: Any) -> None:
    host = subject.host
    latent = torch.randn(1, 4, 8, 12) * 0.5
    with torch.inference_mode(False), torch.enable_grad():
        z = latent.clone().requires_grad_()
        image = host.decode_differentiable(z)
        weights = torch.randn(image.shape)
        (gradient,) = torch.autograd.grad((image * weights).sum(), z)
        direction = gradient / gradient.norm()
        slope = directional(
            lambda t: (host.decode_differentiable(t).double() * weights).sum(), z.detach(), direction, 2e-3
        )
    assert image.shape == (1, 3, 64, 96)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)
    decoded = host.decode_latent(latent)
    seen = ((image.detach() + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert_rounds_to(seen, decoded, roundings(subject.networks()[1]))


def test_decoder_and_network_work_together_in_one_run(subject: Any) -> None:
    """CLIP guidance: image space loss, through VAE and UNet, back to the noisy latent."""

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            y = x.clone().requires_grad_()
            image = subject.host.decode_differentiable(denoiser.denoised(y, SIGMA, conds[0]))
            (gradient,) = torch.autograd.grad(image.square().mean(), y)
        return gradient, denoiser.denoised(x, SIGMA, conds[0])

    x = torch.randn(1, 4, 16, 16)
    gradient, after = subject.run(x, method, gradients=True)
    assert torch.isfinite(gradient).all() and float(gradient.abs().sum()) > 0
    assert_rounds_to(after, subject.run(x, plain), subject.roundings)


def test_weights_and_plain_output_are_untouched(subject: Any) -> None:
    x = torch.randn(1, 4, 16, 16)

    def state() -> list[Any]:
        parameters = [p for network in subject.networks() for p in network.parameters()]
        return [(p.data_ptr(), p.requires_grad, p.grad is None) for p in parameters]

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            y = x.clone().requires_grad_()
            subject.host.decode_differentiable(denoiser.denoised(y, SIGMA, conds[0])).sum().backward()
            return y.grad

    image, output = subject.host.decode_latent(x), subject.run(x, plain)
    before = state()
    assert subject.run(x, method, gradients=True) is not None
    assert torch.equal(subject.run(x, plain), output)
    assert torch.equal(subject.host.decode_latent(x), image)
    assert state() == before


def test_gradients_have_to_be_asked_for(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> None:
        with denoiser.differentiable():
            pass

    with pytest.raises(RetraceError, match="gradients=True"):
        subject.run(torch.randn(1, 4, 16, 16), method)


def test_an_error_inside_restores_the_mode(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with pytest.raises(ZeroDivisionError), denoiser.differentiable():
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            _ = 1 / 0
        return torch.is_grad_enabled(), denoiser.denoised(x, SIGMA, conds[0]).requires_grad

    assert subject.run(torch.randn(1, 4, 16, 16), method, gradients=True) == (False, False)
    assert torch.is_inference_mode_enabled()


def test_attention_hooks_and_features_are_differentiable(subject: Any) -> None:
    maps = []

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        if call.kind == "cross":
            maps.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return call.attend(q, k, v)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.features(["up.0"]) as reference:
            denoiser.denoised(x, SIGMA, conds[0])
            kept = reference["up.0"]
        with denoiser.differentiable(), denoiser.attention(hook), denoiser.features(["up.0"]) as features:
            y = (x + 0.1).requires_grad_()
            denoiser.denoised(y, SIGMA, conds[0])
            moved = (features["up.0"] * kept).sum()  # multiplication saves both sides for backward
            through_features = torch.autograd.grad(moved, y, retain_graph=True)[0]
            through_maps = torch.autograd.grad(maps[0][..., 1].sum(), y)[0]
        return through_features, through_maps

    for gradient in subject.run(torch.randn(1, 4, 16, 16), method, gradients=True):
        assert float(gradient.abs().sum()) > 0
