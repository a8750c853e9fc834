"""What only the ComfyUI host has: its scales, the conditions of graphs, core's samplers, its loader."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidFile
from tests.rounding import assert_rounds_to


def test_euler_by_hand_equals_core(comfy_subject: Any) -> None:
    import comfy.sample
    import comfy.samplers

    from retrace.core.host import guided

    host = comfy_subject.host
    positive, negative = host.encode_text("a red circle"), host.encode_text("")
    sigmas = host.sigmas("normal", 4)[1:]  # below the highest level core adds the noise as it is
    noise = torch.randn(2, 4, 16, 16)
    seen = []
    core = comfy.sample.sample_custom(
        host.model, noise, 5.0, comfy.samplers.sampler_object("euler"), sigmas, positive, negative,
        torch.zeros(2, 4, 16, 16), disable_pbar=True, callback=lambda step, x0, x, total: seen.append(x0),
    )  # fmt: skip

    def euler(denoiser: Any, x: Any, conds: Any) -> Any:
        estimates = []
        for now, following in itertools.pairwise(sigmas):
            uncond, cond = denoiser.denoised_each(x, now, [conds["negative"], conds["positive"]])
            estimates.append(guided(uncond, cond, 5.0))
            x = x + (x - estimates[-1]) / now * (following - now)
        return x, estimates

    x, estimates = host.run(noise * sigmas[0], {"positive": positive, "negative": negative}, euler)
    count = 4 * (5**2 + 4**2) * comfy_subject.roundings  # of steps at guidance 5
    assert_rounds_to(estimates, [e.clone() for e in seen], count)
    assert_rounds_to(host.from_model_scale(x), core, count)


def test_scales_convert_and_leave_an_empty_latent_alone(comfy_subject: Any) -> None:
    import comfy.latent_formats

    from retrace.hosts.comfyui import ComfyHost

    model = comfy_subject.host.model.clone()
    model.add_object_patch("latent_format", comfy.latent_formats.SD15())
    host = ComfyHost(model, comfy_subject.host.clip)
    samples = torch.randn(1, 4, 16, 16)
    assert_rounds_to(host.to_model_scale(samples), samples * 0.18215, 1)
    assert_rounds_to(host.from_model_scale(host.to_model_scale(samples)), samples, 2)
    assert torch.equal(host.to_model_scale(torch.zeros(1, 4, 8, 8)), torch.zeros(1, 4, 8, 8))
    latent = host.run(samples, {"p": host.encode_text("x")}, lambda denoiser, x, conds: x)
    assert torch.equal(latent, samples), "run() takes and gives latents in the model's scale"


def test_joined_prompts_keep_their_own_embeddings(comfy_subject: Any) -> None:
    host = comfy_subject.host
    left, right = host.encode_text("a red circle"), host.encode_text("a blue square")
    area = [[right[0][0], {**right[0][1], "area": (16, 8, 0, 8), "strength": 1.0}]]

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        joined, alone = conds["joined"], conds["left"]
        changed = joined.with_embedding(alone.embedding * 0)
        counts = denoiser.evaluations
        estimate = denoiser.denoised(x, 2.0, joined)
        return (
            len(joined.entries),
            denoiser.evaluations - counts,
            torch.equal(joined.embedding, alone.embedding),
            [float(e["model_conds"]["c_crossattn"].cond.abs().sum()) > 0 for e in changed.entries],
            estimate,
            denoiser.denoised(x, 2.0, alone),
        )

    entries, evaluations, first, nonzero, estimate, alone = host.run(
        torch.randn(1, 4, 16, 16), {"joined": left + area, "left": left}, method
    )
    assert (entries, evaluations, first, nonzero) == (2, 2, True, [False, True])
    assert_rounds_to(estimate[..., :4], alone[..., :4], comfy_subject.roundings)
    assert not torch.allclose(estimate[..., 8:], alone[..., 8:], atol=1e-3)


def test_a_missing_weight_file_is_named(comfy_subject: Any, tmp_path: Any) -> None:
    from retrace.hosts.comfyui import load_pebble

    with pytest.raises(InvalidFile, match=r"config\.json is missing"):
        load_pebble(tmp_path)
