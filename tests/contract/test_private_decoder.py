"""A decoder to train on one picture: the host's own decoder at first, and never the host's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from retrace.blending.decoder import Training, reconstruct_background
from tests.rounding import assert_rounds_to, roundings

pytestmark = pytest.mark.rounding


def _vae(subject: Any) -> torch.nn.Module:
    return subject.networks()[1]  # type: ignore[no-any-return]


def test_it_decodes_as_the_host_does(subject: Any) -> None:
    latent = torch.randn(1, 4, 6, 8) * 0.5
    with torch.inference_mode(False), subject.host.private_decoder(latent) as decoder:
        picture = decoder(latent.clone())
        assert picture.shape == (1, 3, 48, 64) and picture.requires_grad
        trained = [name for name, p in decoder.named_parameters() if p.requires_grad]
        assert trained and all(".decoder." in name for name in trained)
    seen = (picture.detach() / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert_rounds_to(seen, subject.host.decode_latent(latent), roundings(_vae(subject)))
    assert all(p.numel() == 0 for p in decoder.parameters())


@pytest.mark.parametrize("half", [torch.float32, torch.float16, torch.bfloat16])
def test_training_raises_the_background_and_leaves_the_vae(subject: Any, half: torch.dtype) -> None:
    if half != torch.float32 and subject.name != "comfyui":
        pytest.skip("the diffusers host keeps its VAE in float32")
    vae, host = _vae(subject), subject.host
    source = torch.rand(2, 8, 8, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:40, 24:] = 1
    edited = torch.where(mask[..., None] > 0, 1 - source, source)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    saved = getattr(host.vae, "vae_dtype", None)
    try:
        if saved is not None:
            host.vae.vae_dtype = half
            vae.to(half)
        weights = {name: value.clone() for name, value in vae.state_dict().items()}
        result = reconstruct_background(host, edited, source, mask, Training(steps=4))
        assert all(torch.equal(weights[name], value) for name, value in vae.state_dict().items())
    finally:
        if saved is not None:
            host.vae.vae_dtype = saved
            vae.to(saved)
            vae.load_state_dict(before)
    assert result.steps == (4, 4) and result.image.dtype == torch.float32
    assert all(after > plain for plain, after in zip(result.before, result.after, strict=True))
    assert all(p.grad is None for p in vae.parameters())


def test_what_core_keeps_on_loaded_layers_is_not_copied(comfy_subject: Any) -> None:
    """Patched weights, pages and pinned memory of a loaded VAE stay with it, and the copy computes with its own."""
    vae = _vae(comfy_subject)
    layer = next(m for m in vae.decoder.modules() if hasattr(m, "weight_function"))  # type: ignore[union-attr]

    class Page:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

    layer._v, layer._v_signature, layer._pin_state = Page(), None, {"page": Page()}
    layer.weight_function, layer.comfy_cast_weights = [lambda weight: weight * 0], True
    try:
        with comfy_subject.host.private_decoder(torch.zeros(1, 4, 4, 4)) as decoder:
            copies = [m for m in decoder.modules() if hasattr(m, "weight_function")]
            assert copies and not any(m.weight_function or m.comfy_cast_weights for m in copies)
            assert not any(hasattr(m, name) for m in copies for name in ("_v", "_v_signature", "_pin_state"))
    finally:
        for name in ("_v", "_v_signature", "_pin_state", "weight_function", "comfy_cast_weights"):
            delattr(layer, name)
    assert not layer.weight_function


def test_an_interrupt_frees_the_copy(comfy_subject: Any) -> None:
    import comfy.model_management as management

    from retrace.hosts.comfyui.autoencoder import progress_with_preview

    copies: list[Any] = []

    class Watched:
        encode_image = comfy_subject.host.encode_image

        @contextmanager
        def private_decoder(self, latent: torch.Tensor) -> Iterator[Any]:
            with comfy_subject.host.private_decoder(latent) as decoder:
                copies.append(decoder)
                management.interrupt_current_processing(True)
                yield decoder

    picture, mask = torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32)
    with pytest.raises(management.InterruptProcessingException):
        reconstruct_background(Watched(), picture, picture, mask, progress=progress_with_preview())
    assert copies and all(p.numel() == 0 for p in copies[0].parameters())
    assert torch.is_inference_mode_enabled()
