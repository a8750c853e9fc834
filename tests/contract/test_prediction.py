"""What a host predicts, at which noise levels, and how it runs a method."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidImage, InvalidSchedule, UnsupportedModel
from retrace.core.host import guided
from tests.rounding import assert_rounds_to

pytestmark = pytest.mark.rounding


# Five steps of SD's noise levels, as printed by ComfyUI 0.33.0.
SIGMAS = {
    "normal": [14.614640, 4.086081, 1.615580, 0.695150, 0.029167, 0.0],
    "karras": [14.614643, 4.796535, 1.274101, 0.247950, 0.029167, 0.0],
    "exponential": [14.614640, 3.088976, 0.652892, 0.137996, 0.029167, 0.0],
    "sgm_uniform": [14.614640, 5.092408, 2.279731, 1.162865, 0.571189, 0.0],
    "simple": [14.614641, 5.087763, 2.276463, 1.160578, 0.569285, 0.0],
    "ddim_uniform": [5.134431, 2.292854, 1.168216, 0.574050, 0.041314, 0.0],
}


def test_training_sigmas_are_those_of_the_scaled_linear_betas(host: Any) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    expected = ((1 - alpha_bar) / alpha_bar).sqrt()
    sigmas = host.training_sigmas()
    assert sigmas.shape == (1000,)
    assert sigmas.device.type == "cpu"
    torch.testing.assert_close(sigmas.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheduler", list(SIGMAS))
def test_schedulers_give_the_values_of_comfyui(host: Any, scheduler: str) -> None:
    sigmas = host.sigmas(scheduler, 5)
    torch.testing.assert_close(sigmas, torch.tensor(SIGMAS[scheduler]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scheduler", "steps"), [("nonsense", 5), ("normal", 0)])
def test_impossible_schedules_are_named(host: Any, scheduler: str, steps: int) -> None:
    with pytest.raises(InvalidSchedule, match=r"nonsense|0 steps"):
        host.sigmas(scheduler, steps)


@pytest.mark.parametrize("timestep", [0, 10, 500, 999])
def test_denoised_is_x_minus_sigma_eps(subject: Any, timestep: int) -> None:
    sigma = float(subject.host.training_sigmas()[timestep])
    x = torch.randn(2, 4, 16, 16) * (1 + sigma**2) ** 0.5

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        return denoiser.denoised(x, sigma, conds[0]), conds[0].embedding

    denoised, embedding = subject.run(x, method)
    # Ho et al. 2020 (DDPM), eq. 15, in k-diffusion's scale: the network sees x / sqrt(1 + sigma^2).
    eps = subject.eps(x / (1 + sigma**2) ** 0.5, timestep, embedding)
    assert_rounds_to(denoised, x - sigma * eps, subject.roundings, size=x)


def test_each_condition_is_estimated_as_if_alone(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        together = denoiser.denoised_each(x, 2.0, conds)
        return together, [denoiser.denoised(x, 2.0, cond) for cond in conds]

    together, alone = subject.run(torch.randn(2, 4, 16, 16), method, "a red circle", "", "a blue square on wood")
    assert len(together) == 3
    assert_rounds_to(together, alone, subject.roundings)
    assert not torch.allclose(together[0], together[1], atol=1e-4), "the text makes no difference"


def test_prompts_of_different_length_go_together(subject: Any) -> None:
    long = "a red circle " * 40  # more than one chunk of 75 tokens

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        together = denoiser.denoised_each(x, 2.0, conds)
        return together, [denoiser.denoised(x, 2.0, c) for c in conds], [c.embedding.shape[1] for c in conds]

    together, alone, tokens = subject.run(torch.randn(1, 4, 16, 16), method, "a red circle", long)
    assert tokens == [77, 154]
    assert_rounds_to(together, alone, subject.roundings)


def test_guidance_is_linear_in_eps_and_x0_alike(subject: Any) -> None:
    timestep = 400
    sigma = float(subject.host.training_sigmas()[timestep])
    x = torch.randn(1, 4, 16, 16) * sigma

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        uncond, cond = denoiser.denoised_each(x, sigma, conds)
        return guided(uncond, cond, 7.5), [c.embedding for c in conds]

    result, embeddings = subject.run(x, method, "", "a red circle")
    uncond, cond = (subject.eps(x / (1 + sigma**2) ** 0.5, timestep, e) for e in embeddings)
    torch.testing.assert_close(result, x - sigma * (uncond + 7.5 * (cond - uncond)), rtol=1e-3, atol=1e-3)


def test_images_of_a_batch_do_not_mix_and_may_have_their_own_sigma(subject: Any) -> None:
    levels = torch.tensor([0.5, 3.0, 9.0])

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        batch = denoiser.denoised(x, levels, conds[0])
        single = [denoiser.denoised(x[i : i + 1], float(levels[i]), conds[0]) for i in range(3)]
        return batch, torch.cat(single)

    batch, single = subject.run(torch.randn(3, 4, 16, 16), method)
    assert_rounds_to(batch, single, subject.roundings)


def test_embeddings_can_be_replaced_for_all_and_per_image(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        first, second = conds
        swapped = denoiser.denoised(x, 2.0, first.with_embedding(second.embedding))
        mixed = denoiser.denoised(x, 2.0, first.with_embedding(torch.cat([first.embedding, second.embedding])))
        return swapped, mixed, *denoiser.denoised_each(x, 2.0, conds), first.embedding.shape

    swapped, mixed, one, two, shape = subject.run(torch.randn(2, 4, 16, 16), method, "a red circle", "a blue square")
    assert shape == (1, 77, 64)
    assert_rounds_to(swapped, two, subject.roundings)
    assert_rounds_to(mixed, torch.stack([one[0], two[1]]), subject.roundings)


def test_evaluations_count_samples_and_conditions(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        denoiser.denoised(x, 2.0, conds[0])
        first = denoiser.evaluations
        denoiser.denoised_each(x, 2.0, conds)
        return first, denoiser.evaluations

    assert subject.run(torch.randn(3, 4, 16, 16), method, "a", "b") == (3, 9)


def test_the_method_gets_the_latent_unchanged_and_ordinary(subject: Any) -> None:
    latent = torch.randn(1, 4, 16, 8)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        estimate = denoiser.denoised(x, 2.0, conds[0])
        tensors = (x, conds[0].embedding, estimate)
        return x, [t.is_inference() for t in tensors], torch.is_grad_enabled(), x.data_ptr() == latent.data_ptr()

    x, inference, grad, same_memory = subject.run(latent, method)
    assert torch.equal(x, latent)
    assert inference == [False] * 3
    assert not grad
    assert not same_memory, "a method may write into its latent"


Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Outcome:
    latent: torch.Tensor
    label: str


def test_results_come_back_detached_in_whatever_holds_them(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            y = x.clone().requires_grad_() * 2
        return {"pair": Pair(y, [y]), "outcome": Outcome(y, "kept"), "number": 3}

    result = subject.run(torch.randn(1, 4, 16, 16), method, gradients=True)
    tensors = [result["pair"].a, result["pair"].b[0], result["outcome"].latent]
    assert all(not t.requires_grad and t.device.type == "cpu" and not t.is_inference() for t in tensors)
    assert (result["outcome"].label, result["number"]) == ("kept", 3)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (4, 16, 16)])
def test_a_latent_of_another_model_is_refused(subject: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage, match="4"):
        subject.run(torch.zeros(shape), lambda denoiser, x, conds: x)


def test_images_go_to_latents_and_back(host: Any) -> None:
    image = torch.rand(2, 64, 128, 3)
    latent = host.encode_image(image)
    assert latent.shape == (2, host.latent_channels, 64 // host.downscale, 128 // host.downscale)
    decoded = host.decode_latent(latent)
    assert decoded.shape == image.shape
    assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1
    assert torch.equal(latent, host.encode_image(image)), "the posterior mean is not random"


@pytest.mark.parametrize("shape", [(1, 60, 64, 3), (64, 64, 3)])
def test_images_that_do_not_fit_are_refused(host: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage):
        host.encode_image(torch.rand(shape))


def test_other_predictions_are_refused_by_name(subject: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"X0|sample"):
        subject.unsupported()


def test_fingerprint_is_stable_and_knows_the_weights(subject: Any, tmp_path: Any) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    fingerprint = subject.host.fingerprint()
    subject.run(torch.randn(1, 4, 16, 16), lambda denoiser, x, conds: denoiser.denoised(x, 1.0, conds[0]))
    assert subject.host.fingerprint() == fingerprint
    assert 8 <= len(fingerprint) <= 64
    assert subject.load(subject.folder).fingerprint() == fingerprint
    changed = tmp_path / "pebble"
    shutil.copytree(subject.folder, changed)
    file = changed / "unet" / "diffusion_pytorch_model.safetensors"
    with torch.inference_mode(False):
        weights = {name: weight + 0.01 for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    assert subject.load(changed).fingerprint() != fingerprint
