"""What only the ComfyUI host has: its scales, the conditions of graphs, core's samplers, its loader."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidFile, InvalidSchedule
from retrace.core.host import from_variance_preserving, to_variance_preserving
from retrace.core.schedule import grid_sigmas, reference_sigmas
from retrace.inversion.invert import InversionSettings
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


@pytest.mark.parametrize("grid", ["leading_0", "leading_1", "uniform_plus_1", "trailing"])
def test_grids_that_end_at_the_lowest_level_begin_at_its_variance(comfy_subject: Any, grid: str) -> None:
    """The papers' z0 has unit variance at that level: x = z0 sqrt(1 + sigma^2), as for every latent of theirs."""
    from retrace.hosts.comfyui.latents import clean_latent
    from retrace.hosts.comfyui.runs.inversion import invert_latent

    host = comfy_subject.host
    samples = host.from_model_scale(torch.randn(2, 4, 8, 8))
    z0 = host.to_model_scale(samples)
    positive = host.encode_text("a red circle")
    lowest = float(host.training_sigmas()[0])
    for parity in (True, False):
        sigmas = (reference_sigmas if parity else grid_sigmas)(grid, host.training_sigmas(), 4)
        inverted = invert_latent(host, samples, sigmas, positive, InversionSettings(), verify=False)
        source = inverted.trajectory.source
        if parity and grid != "trailing":
            assert float(sigmas[-1]) == pytest.approx(lowest)
            assert_rounds_to(source, z0 * (1 + lowest**2) ** 0.5, 2)
            assert float((source / z0).mean()) > 1 + lowest**2 / 4  # more than rounding
        else:
            assert float(sigmas[-1]) == 0 and torch.equal(source, z0)
        assert torch.equal(source, clean_latent(host, samples, sigmas))
    higher = host.sigmas("normal", 4)[:-2]  # a path that ends elsewhere is taken as it is
    assert torch.equal(clean_latent(host, samples, higher), z0)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("sigma", [0.0, 0.03, 1.0, 14.6])
def test_the_scale_of_the_papers_and_ours(kind: Any, sigma: float) -> None:
    x = torch.randn(1, 4, 8, 8)
    z = to_variance_preserving(x, sigma, kind)
    assert_rounds_to(z, x if kind == "flow" else x / (1 + sigma**2) ** 0.5, 2)
    assert_rounds_to(from_variance_preserving(z, sigma, kind), x, 2)


def test_stochastic_samplers_are_refused_by_name(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui.sampling import STOCHASTIC_SAMPLERS, require_deterministic

    for name in (*sorted(STOCHASTIC_SAMPLERS), "my_new_sde", "euler_ancestral_RF"):
        with pytest.raises(InvalidSchedule, match=f"'{name}' adds fresh noise.*ddim, euler"):
            require_deterministic(name)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpmpp_2m", "uni_pc", "deis", "euler_cfg_pp"])
def test_deterministic_samplers_pass(comfy_subject: Any, name: str) -> None:
    from retrace.hosts.comfyui.sampling import require_deterministic

    require_deterministic(name)


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
