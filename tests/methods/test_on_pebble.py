"""The promises of the README on a few held-out scenes; ``python -m benchmarks.pebble`` measures all of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import pebble
from retrace.hosts.diffusers import DiffusersHost


@pytest.fixture(scope="module")
def host() -> DiffusersHost:
    return DiffusersHost.load(None, device="cpu")


def test_the_autoencoder_keeps_the_picture(host: DiffusersHost) -> None:
    assert pebble.vae_reconstruction(host, 32)["psnr_db"] >= 30


def test_samples_show_the_asked_colour_and_shape(host: DiffusersHost) -> None:
    assert pebble.prompt_following(host, 32)["right"] >= 0.9


def test_clip_finds_the_caption_among_32() -> None:
    assert pebble.clip_retrieval(128)["top1_of_32"] >= 0.95


def test_inversion_comes_back_to_the_autoencoders_bound(host: DiffusersHost) -> None:
    loss = pebble.inversion_round_trip(host, 16)
    assert loss["ddim_50_loss_db"] <= 1.0
    assert loss["fixed_point_25_loss_db"] <= loss["ddim_50_loss_db"]


def test_a_red_circle_becomes_a_blue_square_and_the_rest_stays(host: DiffusersHost) -> None:
    result = pebble.blend_edits(host, 32)
    assert result["success"] >= 0.8
    assert result["identical_outside"] == 1.0


def test_blending_with_nothing_to_edit_returns_the_reconstruction(host: DiffusersHost) -> None:
    from retrace.blending import Blend

    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = host.sigmas("ddim_uniform", 4)
    run = Blend(latents, torch.zeros(1, 16, 16), host.parametrisation).start(sigmas, latents)
    cond = {"positive": host.encode_text("a red circle")}
    out = host.run(latents, cond, lambda model, x, c: run.finish(model.denoised(run(x, 3.0), 3.0, c["positive"])))
    assert torch.equal(out, latents)
