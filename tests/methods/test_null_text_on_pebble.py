"""Null-text inversion on a few held-out scenes, with captions that leave out the ground."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.sampling import sample_ddim
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion.invert import invert
from retrace.inversion.null_text.optimise import NullText, optimise_null_text
from retrace.inversion.null_text.settings import NullTextSettings
from retrace.metrics import psnr
from retrace.models.pebble.scenes import heldout, render_batch

SETTINGS = NullTextSettings(scale=7.5)


@pytest.fixture(scope="module")
def host() -> DiffusersHost:
    return DiffusersHost.load(None, device="cpu")


def reconstruct(
    host: DiffusersHost, count: int, steps: int, settings: NullTextSettings = SETTINGS
) -> tuple[NullText, dict[str, float]]:
    """The result and the mean PSNR of pictures: VAE alone, plain guided DDIM, null-text."""
    scenes = heldout(count)
    images = render_batch(scenes).permute(0, 2, 3, 1).contiguous()
    sigmas = host.sigmas("ddim_uniform", steps)
    latents = host.encode_image(images)
    captions = [host.encode_text(scene.caption(with_ground=False)) for scene in scenes]
    conds = {
        "positive": captions[0].with_embedding(torch.cat([caption.embedding for caption in captions])),
        "negative": host.encode_text(""),
    }

    def method(model: Any, x: Any, c: Any) -> Any:
        cond, uncond = c["positive"], c["negative"]
        trajectory = invert(model, x, sigmas, cond)
        found = optimise_null_text(model, trajectory, cond, uncond, settings, only_text_differs=True)
        back = trajectory.noise
        for i, embedding in enumerate(found.embeddings):
            back = sample_ddim(model, back, sigmas[i : i + 2], cond, uncond.with_embedding(embedding), settings.scale)
        return found, sample_ddim(model, trajectory.noise, sigmas, cond, uncond, settings.scale), back

    found, plain, back = host.run(latents, conds, method, gradients=True)
    pictures = {"vae": latents, "plain": plain, "null": back}
    return found, {name: float(psnr(host.decode_latent(z), images).mean()) for name, z in pictures.items()}


@pytest.mark.slow
def test_it_returns_to_the_autoencoders_bound(host: DiffusersHost) -> None:
    found, decibels = reconstruct(host, 2, 50)
    assert decibels["null"] >= decibels["vae"] - 1
    assert decibels["null"] >= decibels["plain"] + 8
    assert torch.isfinite(found.embeddings).all()


@pytest.mark.slow
def test_the_default_costs_a_third_and_loses_nothing(host: DiffusersHost) -> None:
    quick, decibels = reconstruct(host, 1, 50)
    reference, wanted = reconstruct(host, 1, 50, SETTINGS.reference())
    assert quick.evaluations <= reference.evaluations / 3
    assert decibels["null"] >= wanted["null"] - 0.5
