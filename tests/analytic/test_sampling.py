"""DDIM sampling on Gaussian data, where the exact answer is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidImage, InvalidSchedule, RetraceError
from retrace.core.host import Parametrisation, add_noise
from retrace.core.sampling import (
    SampleStep,
    ancestral_step,
    ancestral_steps,
    cfg,
    ddim_step,
    sample,
    sample_ddim,
    steered,
    steps_of,
)

from .gaussian import Gaussian, Mean, centre, ladder, natural, relative, slope


@pytest.mark.parametrize(("kind", "top", "power"), [("eps", 10.0, 3.0), ("v", 10.0, 3.0), ("flow", 1.0, 1.0)])
def test_sampling_error_halves_when_the_steps_double(kind: Parametrisation, top: float, power: float) -> None:
    model = natural(parametrisation=kind)
    cond = centre(model)
    x0 = model.draw(2, cond)
    noise = model.exact(x0, 0.0, top, cond)
    counts = [20, 40, 80, 160]
    errors = [relative(sample_ddim(model, noise, ladder(n, top, power), cond), x0) for n in counts]
    assert errors[-1] < 0.02
    assert 0.85 < slope(counts, errors) < 1.15
    assert errors[-2] / errors[-1] == pytest.approx(2, rel=0.1)


def test_a_step_follows_the_formula_and_its_ends() -> None:
    x, denoised = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1, 2), 1.0)
    assert ddim_step(x, denoised, 2.0, 1.0).tolist() == [[[[2.0, 2.0]]]]
    assert ddim_step(x, denoised, 2.0, 4.0).tolist() == [[[[5.0, 5.0]]]]
    assert ddim_step(x, denoised, 2.0, 0.0) is denoised
    assert ddim_step(x, denoised, 2.0, 2.0) is x
    with pytest.raises(InvalidSchedule, match=r"from noise level 0 to 0\.5 has no direction.*first level above 0"):
        ddim_step(x, denoised, 0.0, 0.5)


@pytest.mark.parametrize(("kind", "sigma", "sigma_next"), [("eps", 4.0, 1.5), ("v", 1.5, 0.2), ("flow", 0.9, 0.6)])
def test_an_ancestral_step_lands_on_the_forward_process(kind: Parametrisation, sigma: float, sigma_next: float) -> None:
    """Noise levels add up to those of the next level, and the picture has its share there."""
    x0, old, new = torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)

    def step(old: Tensor, new: Tensor) -> Tensor:
        return ancestral_step(add_noise(x0, old, sigma, kind), x0, sigma, sigma_next, new, kind)

    signal = step(old * 0, new * 0)
    assert float(signal) == pytest.approx(float(add_noise(x0, old * 0, sigma_next, kind)), abs=1e-6)
    kept, added = float(step(old, new * 0) - signal), float(step(old * 0, new) - signal)
    assert kept**2 + added**2 == pytest.approx(sigma_next**2, rel=1e-5)
    assert added > kept > 0
    if kind != "flow":  # the posterior's own share of the old noise (Ho et al. 2020, eq. 7)
        assert kept == pytest.approx(sigma_next**2 / sigma, rel=1e-5)


def test_an_ancestral_step_ends_at_the_clean_estimate() -> None:
    x, denoised = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1, 2), 1.0)
    assert ancestral_step(x, denoised, 2.0, 0.0, x, "eps") is denoised
    assert ancestral_step(x, denoised, 2.0, 2.0, x, "eps") is x


@pytest.mark.parametrize(("kind", "top", "power"), [("eps", 10.0, 3.0), ("flow", 1.0, 1.0)])
def test_ancestral_samples_come_to_spread_as_the_data_does(kind: Parametrisation, top: float, power: float) -> None:
    model = natural(parametrisation=kind)
    cond = centre(model)
    data = model.draw(4000, cond)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1), dtype=data.dtype)
    start = add_noise(data, noise, top, kind)
    missing = []
    for n in (80, 320):
        steps = ancestral_steps(torch.Generator().manual_seed(2), kind)
        out = sample(model, start, ladder(n, top, power), cfg(model, cond), steps)
        missing.append(abs(1 - float(out.std(0).mean() / data.std(0).mean())))
        assert relative(out.mean(0), cond.embedding.view_as(out[0])) < 0.08  # 4000 draws alone are 0.05 off
    assert missing[0] < 0.08 and missing[1] < 0.03
    assert 2 < missing[0] / missing[1] < 5, "the error of the spread falls with the step length"


def test_a_point_is_found_in_one_step_whatever_the_start() -> None:
    model = Gaussian((2, 2, 2), torch.zeros(8))  # all data is one point: D is constant, so one step is exact
    cond = centre(model)
    out = sample_ddim(model, torch.randn(3, 2, 2, 2) * 14, torch.tensor([14.6, 0.0]), cond)
    assert torch.equal(out, cond.embedding.view(1, 2, 2, 2).expand(3, -1, -1, -1))


def test_guidance_moves_the_mean_linearly_and_costs_two_evaluations() -> None:
    model = natural()
    cond, uncond = centre(model, 0.4), centre(model, 0.1)
    noise = model.draw(1, cond) * 0 + 10
    sigmas = ladder(10, 10.0, 3.0)
    guided = sample_ddim(model, noise, sigmas, cond, uncond, scale=3.0)
    assert model.evaluations == 20
    # For this model D is linear in the mean, so guidance 3 is the same as the mean itself moved threefold.
    moved = Mean(uncond.embedding + 3 * (cond.embedding - uncond.embedding))
    assert relative(guided, sample_ddim(model, noise, sigmas, moved)) < 1e-12
    assert model.evaluations == 30
    sample_ddim(model, noise, sigmas, cond, uncond, scale=1.0)
    assert model.evaluations == 40


def test_callback_sees_every_step_and_can_replace_the_latent() -> None:
    model = natural()
    cond = centre(model)
    sigmas = ladder(4, 10.0, 1.0)
    seen: list[SampleStep] = []

    def paste(done: SampleStep) -> Tensor | None:
        seen.append(done)
        return torch.zeros_like(done.x) if done.sigma_next == 0 else None

    noise = model.draw(1, cond)
    out = sample_ddim(model, noise, sigmas, cond, callback=paste)
    levels = [(1, 10.0, 7.5), (2, 7.5, 5.0), (3, 5.0, 2.5), (4, 2.5, 0.0)]
    assert [(done.step, done.sigma, done.sigma_next) for done in seen] == levels
    assert {done.total for done in seen} == {4}
    for before, done in zip([noise, *(done.x for done in seen)], seen, strict=False):
        assert torch.equal(done.x, ddim_step(before, done.denoised, done.sigma, done.sigma_next))
    assert out.abs().max() == 0
    assert model.steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_steps_between_equal_levels_are_left_out() -> None:
    assert list(steps_of([5.0, 2.0, 2.0, 0.5, 0.5, 0.5])) == [(0, 5.0, 2.0), (2, 2.0, 0.5)]
    model = natural()
    cond = centre(model)
    x, seen = model.draw(1, cond), []
    twice = torch.tensor([5.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    out = sample_ddim(model, x, twice, cond, callback=lambda done: seen.append((done.step, done.total)))
    assert model.evaluations == 2
    assert seen == model.steps == [(1, 3), (2, 3)]
    assert torch.equal(out, sample_ddim(model, x, twice[:-1], cond))


def test_a_guide_steers_every_estimate_and_may_ask_for_more() -> None:
    """This one keeps half of each estimate, and asks at a point of its own as well."""
    model = natural()
    cond, uncond = centre(model, 0.4), centre(model, 0.1)
    x, sigmas, asked = model.draw(1, cond), ladder(4, 10.0, 3.0), []

    def half(x: Tensor, sigma: float, predict: Callable[[Tensor], Tensor]) -> Tensor:
        asked.append(sigma)
        predict(2 * x)
        return predict(x) / 2

    out = sample(model, x, sigmas, steered(cfg(model, cond, uncond, 3.0), half))
    assert asked == sigmas[:-1].tolist() and model.evaluations == 4 * 2 * 2
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        without, with_text = model.denoised_each(x, sigma, [uncond, cond])
        x = ddim_step(x, (without + 3.0 * (with_text - without)) / 2, sigma, sigma_next)
    assert torch.equal(out, x)


def test_interrupt_passes_through() -> None:
    class Interrupt(BaseException):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Interrupt

    model = natural()
    model.on_progress = stop
    with pytest.raises(Interrupt):
        sample_ddim(model, model.draw(1, centre(model)), ladder(5, 10.0, 1.0), centre(model))
    assert model.evaluations == 2


def test_bad_input_is_an_error_that_says_what_to_do() -> None:
    model = natural()
    cond = centre(model)
    x = model.draw(1, cond)
    with pytest.raises(InvalidSchedule, match="turn them round"):
        sample_ddim(model, x, torch.tensor([0.0, 1.0]), cond)
    with pytest.raises(InvalidImage, match="NaN or infinite"):
        sample_ddim(model, x * float("nan"), torch.tensor([1.0, 0.0]), cond)
    broken = Mean(cond.embedding * float("inf"))
    with pytest.raises(RetraceError, match=r"NaN or infinity at step 1 of 3 \(noise level 9\).*32-bit"):
        sample_ddim(model, x, torch.tensor([9.0, 4.0, 1.0, 0.0]), broken)
