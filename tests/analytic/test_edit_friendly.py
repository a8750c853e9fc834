"""Edit-friendly inversion on Gaussian data: exact return, the laws of its noises, costs and errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidImage, InvalidSchedule, InvalidSetting, RetraceError, TrajectoryMismatch
from retrace.core.host import Origin
from retrace.core.sampling import SampleStep, ddpm_mean
from retrace.core.schedule import grid_sigmas, reference_sigmas
from retrace.inversion.edit_friendly import (
    EditFriendly,
    EditFriendlySettings,
    ddpm_levels,
    invert_edit_friendly,
    sample_edit_friendly,
    without_first_steps,
)

from .gaussian import Gaussian, Mean, centre, ladder, natural, numbers, relative, stable_diffusion_sigmas

pytestmark = pytest.mark.rounding

SCALE = 3.5
KINDS = ["eps", "v", "flow"]


@dataclass
class Rows(Gaussian):
    """The Gaussian with a noise level per row; counts its calls."""

    calls: int = 0

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
        self.calls += 1
        levels = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)).tolist()
        if len(set(levels)) == len(cond.embedding) == 1:
            return super().denoised(x, levels[0], cond)
        means = cond.embedding.expand(len(x), -1, -1)
        each = zip(x.split(1), levels, means.split(1), strict=True)
        return torch.cat([super(Rows, self).denoised(row, level, Mean(mean)) for row, level, mean in each])


def rows(kind: str = "eps", dtype: torch.dtype = torch.float64) -> Rows:
    model = natural(parametrisation=kind, dtype=dtype)  # type: ignore[arg-type]
    return Rows(model.shape, model.std, model.parametrisation, model.basis, bend=0.5)


def words(model: Gaussian) -> tuple[Mean, Mean, Mean]:
    """Source, empty and target."""
    return centre(model), Mean(0 * centre(model).embedding), centre(model, -0.5)


def grid(kind: str, steps: int) -> Tensor:
    if kind == "flow":
        return ladder(steps, 1.0, 1.0)
    return grid_sigmas("leading_1", stable_diffusion_sigmas(), steps)


def inverted(
    model: Gaussian, x0: Tensor, sigmas: Tensor, cond: Mean, uncond: Mean | None = None, **settings: Any
) -> EditFriendly:
    """The noises of ``x0``, at the guidance of these tests unless ``settings`` say otherwise."""
    return invert_edit_friendly(model, x0, sigmas, cond, uncond, EditFriendlySettings(**{"scale": SCALE, **settings}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [0, 7, 19])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_returns_to_the_image(kind: str, skip: int, dtype: torch.dtype, tolerance: float) -> None:
    model = rows(kind, dtype)
    source, empty, target = words(model)
    x0 = model.draw(2, source)
    found = inverted(model, x0, grid(kind, 20), source, empty, seed=3)
    back = sample_edit_friendly(model, found, source, empty, SCALE, skip)
    assert relative(back, x0) < tolerance
    assert relative(sample_edit_friendly(model, found, target, empty, SCALE, skip), x0) > 10 * tolerance


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("end", ["zero", "above", "twice"])
def test_whatever_the_last_level(eta: float, end: str) -> None:
    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(1, source)
    sigmas = {"zero": ladder(8, 10.0, 3.0), "above": ladder(8, 10.0, 3.0)[:-1]}.get(end)
    if sigmas is None:
        sigmas = reference_sigmas("leading_0", stable_diffusion_sigmas(), 10)
    found = inverted(model, x0, sigmas, source, empty, seed=3, eta=eta)
    assert torch.equal(found.trajectory.source, x0)
    assert relative(sample_edit_friendly(model, found, source, empty, SCALE), x0) < 1e-12
    assert bool(found.remainder.any()) == (end == "zero")
    if end == "twice":
        assert not found.noises[-1].any() and torch.equal(found.trajectory.latents[-2], x0)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_step_is_the_posterior_of_ddpm(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, written out in the variance-preserving scale; at eta 1 Ho et al. 2020, eq. 7."""
    x, clean = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma, sigma_next in pairwise(grid("eps", 12)[:-1].double().tolist()):
        a, b = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        eps = (x * math.sqrt(a) - math.sqrt(a) * clean) / math.sqrt(1 - a)
        spread = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        mean = math.sqrt(b) * clean + math.sqrt(1 - b - spread**2) * eps
        down, up = ddpm_levels(sigma, sigma_next, eta, "eps")
        assert up == pytest.approx(spread / math.sqrt(b), rel=1e-12)
        assert relative(ddpm_mean(x, clean, sigma, sigma_next, down, "eps") * math.sqrt(b), mean) < 1e-12
        if eta == 1:
            beta = 1 - a / b
            posterior = math.sqrt(b) * beta / (1 - a) * clean + math.sqrt(a / b) * (1 - b) / (1 - a) * x * math.sqrt(a)
            assert relative(mean, posterior) < 1e-12
            assert spread**2 == pytest.approx((1 - b) / (1 - a) * beta, rel=1e-9)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_step_is_the_ancestral_euler_step(kind: str) -> None:
    """``down`` and ``up`` of k-diffusion; a flow model takes it in ``x / (1 - s)``, whose level is ``s / (1 - s)``."""
    x, clean = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma, sigma_next in [(0.9, 0.7), (0.7, 0.1), (0.1, 0.01)]:
        down, up = ddpm_levels(sigma, sigma_next, 0.8, kind)  # type: ignore[arg-type]
        mean = ddpm_mean(x, clean, sigma, sigma_next, down, kind)  # type: ignore[arg-type]
        y, s, t, shrink = x, sigma, sigma_next, 1.0
        if kind == "flow":
            y, s, t, shrink = x / (1 - sigma), sigma / (1 - sigma), sigma_next / (1 - sigma_next), 1 - sigma_next
        s_up = 0.8 * (t**2 * (s**2 - t**2) / s**2) ** 0.5
        s_down = (t**2 - s_up**2) ** 0.5
        assert (down / shrink, up / shrink) == pytest.approx((s_down, s_up))
        assert relative(mean, shrink * (y + (y - clean) / s * (s_down - s))) < 1e-12


def test_a_flow_step_from_pure_noise() -> None:
    """At level 1 the latent says nothing about the image: the next one is made of the estimate and new noise only."""
    assert ddpm_levels(1.0, 0.8, 1.0, "flow") == (0.0, 0.8)


def test_the_noises_of_one_image_are_stronger_than_fresh_ones_and_turn_back() -> None:
    """Where the model knows the image (a point), z_i = (s' e' - s'^2 / s e) / up: variance (s^2 + s'^2) / (s^2 -
    s'^2) > 1, and neighbours correlate by -s''^2 / (up up'), the two findings of the paper's section 3."""
    model = rows()
    model.std, model.bend = 0 * model.std, 0.0
    source, _, _ = words(model)
    sigmas = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.2, 0.0], dtype=torch.float64)
    found = inverted(model, model.draw(3000, source), sigmas, source, seed=0, batch=1)
    z = found.noises.flatten(1)
    levels = sigmas.tolist()
    ups = [ddpm_levels(s, t, 1.0, "eps")[1] for s, t in pairwise(levels)]
    for i, (s, t) in enumerate(pairwise(levels[:-1])):
        expected = (s**2 + t**2) / (s**2 - t**2)
        assert float(z[i].square().mean()) == pytest.approx(expected, rel=0.02) and expected > 1
        assert numbers(found.trajectory, "strengths")[i] == pytest.approx(expected**0.5, rel=0.02)
    for i in range(3):
        together = float((z[i] * z[i + 1]).mean())
        assert together == pytest.approx(-(levels[i + 2] ** 2) / (ups[i] * ups[i + 1]), abs=0.02)
    assert float((z[0] * z[2]).mean()) == pytest.approx(0, abs=0.02)
    assert float(found.remainder.abs().max()) < 1e-9


def test_the_variance_of_the_noises_of_a_perfect_model() -> None:
    """For data of variance v, with g = v / (v + s^2) and r = s'^2 / s^2: what the posterior mean misses is ((1 - r) (1
    - g) (x0 - mean) + s' e' - (r + (1 - r) g) s e), in every direction by itself."""
    model = rows()
    model.bend = 0.0
    source, _, _ = words(model)
    s, t = 4.0, 1.5
    x0 = model.draw(4000, source)
    found = inverted(model, x0, torch.tensor([s, t, 0.0], dtype=torch.float64), source, seed=1, batch=1)
    v, r = model.std**2, (t / s) ** 2
    g = v / (v + s**2)
    up = ddpm_levels(s, t, 1.0, "eps")[1]
    expected = ((1 - r) ** 2 * (1 - g) ** 2 * v + t**2 + ((r + (1 - r) * g) * s) ** 2) / up**2
    measured = model._to(found.noises[0]).square().mean(0)
    assert torch.allclose(measured, expected, rtol=0.12)
    assert float(measured.mean()) == pytest.approx(float(expected.mean()), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noises_make_up_the_step_between_stored_latents(kind: str) -> None:
    model = rows(kind)
    source, empty, _ = words(model)
    found = inverted(model, model.draw(2, source), grid(kind, 6), source, empty, seed=1)
    path = found.trajectory
    for i in range(6):
        without, with_text = (model.denoised(path.latents[i], float(path.sigmas[i]), c) for c in (empty, source))
        step = found.step(i, path.latents[i], without + SCALE * (with_text - without))
        assert relative(step, path.latents[i + 1]) < 1e-12
        # Images in turn, as 'Repeat Latent Batch' lays them out.
        many = found.step(
            i, path.latents[i].repeat(3, 1, 1, 1), (without + SCALE * (with_text - without)).repeat(3, 1, 1, 1)
        )
        assert torch.equal(many, step.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_costs_are_counted_and_batches_change_nothing(batch: int) -> None:
    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(2, source)
    reference = inverted(model, x0, grid("eps", 8), source, empty, seed=1, batch=1)
    model.calls = model.evaluations = 0
    model.steps.clear()
    found = inverted(model, x0, grid("eps", 8), source, empty, seed=1, batch=batch)
    assert relative(found.noises, reference.noises) < 1e-12
    assert relative(found.remainder, reference.remainder) < 1e-12
    assert found.trajectory.report["evaluations"] == model.evaluations == 2 * 2 * 8
    assert model.calls == 2 * math.ceil(8 / batch)
    assert model.steps == [(min(k + batch, 8), 8) for k in range(0, 8, batch)]

    model.evaluations = 0
    for scale, uncond in ((1.0, empty), (SCALE, None)):
        plain = inverted(model, x0, grid("eps", 8), source, uncond, scale=scale, seed=1, batch=batch)
        assert plain.trajectory.report["evaluations"] == 2 * 8 and plain.scale == 1
    model.evaluations = 0
    sample_edit_friendly(model, found, source, empty, SCALE, skip=3)
    assert model.evaluations == 2 * 2 * 5
    parity = reference_sigmas("leading_0", stable_diffusion_sigmas(), 8)
    closing = inverted(model, x0, parity, source, empty, seed=1, batch=batch)
    assert closing.trajectory.report["evaluations"] == 2 * 2 * 7


def test_an_embedding_per_image_goes_step_by_step() -> None:
    model = rows()
    source, empty, _ = words(model)
    each = Mean(torch.cat([source.embedding, -source.embedding]))
    x0 = model.draw(1, source).repeat(2, 1, 1, 1)
    found = inverted(model, x0, grid("eps", 6), each, empty, seed=1, batch=4)
    assert model.calls == 2 * 6
    assert relative(sample_edit_friendly(model, found, each, empty, SCALE), x0) < 1e-12


def test_seeds_and_skipped_steps() -> None:
    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(1, source)
    sigmas = grid("eps", 10)

    def invert(seed: int, skip: float) -> Any:
        left = without_first_steps(sigmas, skip)
        return inverted(model, x0, left, source, empty, seed=seed)

    whole, again, other, short = invert(1, 0.0), invert(1, 0.0), invert(2, 0.0), invert(1, 0.36)
    assert torch.equal(whole.noises, again.noises) and not torch.equal(whole.noises, other.noises)
    assert relative(short.noises, whole.noises[4:]) < 1e-12
    assert torch.equal(whole.trajectory.latents[4:], short.trajectory.latents)
    edits = [sample_edit_friendly(model, whole, source, skip=4), sample_edit_friendly(model, short, source)]
    assert relative(*edits) < 1e-12
    assert [len(without_first_steps(sigmas, skip)) for skip in (0, 0.5, 0.99, 1)] == [11, 6, 2, 2]


def test_it_says_whose_it_is_and_what_it_cost() -> None:
    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(2, source)
    settings = EditFriendlySettings(SCALE, seed=3, batch=4)
    found = invert_edit_friendly(model, x0, grid("eps", 8), source, empty, settings, Origin("abc", "1 channel"))
    assert (found.trajectory.fingerprint, found.trajectory.latent_format) == ("abc", "1 channel")
    strengths = numbers(found.trajectory, "strengths")
    lines = found.text(321).splitlines()
    assert lines[0] == "edit_friendly, 8 steps, 2 image(s), guidance 3.5, seed 3"
    assert lines[1] == f"start at noise level {float(found.trajectory.sigmas[0]):.3f}"
    assert lines[2].startswith("32 network evaluations, 4 steps at a time, ") and lines[2].endswith(" s")
    assert f"{sum(strengths) / 7:.2f} on average, {max(strengths):.2f} at most" in lines[3] and len(strengths) == 7
    assert lines[4:] == ["peak memory 321 MB"]
    assert ", one step at a time, " in inverted(model, x0, grid("eps", 8), source, empty, batch=1).text()


def test_fewer_steps_stay_closer() -> None:
    model = rows()
    source, empty, target = words(model)
    x0 = model.draw(4, source)
    found = inverted(model, x0, grid("eps", 20), source, empty, seed=1)
    away = [relative(sample_edit_friendly(model, found, target, empty, 7.5, skip), x0) for skip in (0, 8, 14, 18)]
    assert away == sorted(away, reverse=True) and away[-1] < 0.5 * away[0]


def test_a_callback_may_replace_the_latent_and_stop_is_obeyed() -> None:
    class Interrupt(BaseException):
        pass

    def stop(step: int) -> None:
        raise Interrupt

    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(1, source)
    found = inverted(model, x0, grid("eps", 4), source, empty, seed=1)
    seen: list[SampleStep] = []

    def zeros(done: SampleStep) -> Tensor:
        seen.append(done)
        return 0 * done.x

    assert not sample_edit_friendly(model, found, source, skip=1, callback=zeros).any()
    assert [(done.step, done.total) for done in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [done.sigma_next for done in seen] == found.trajectory.sigmas[2:].tolist()
    model.on_progress, model.calls = stop, 0
    with pytest.raises(Interrupt):
        inverted(model, x0, grid("eps", 4), source, empty, seed=1, batch=2)
    with pytest.raises(Interrupt):
        sample_edit_friendly(model, found, source)
    assert model.calls == 3


def test_the_steps_that_a_sampler_may_ask_for() -> None:
    model = rows()
    source, _, _ = words(model)
    found = inverted(model, model.draw(2, source), grid("eps", 8), source, seed=1)
    sigmas = found.trajectory.sigmas
    assert found.first_step(sigmas) == 0
    assert found.first_step(sigmas[3:].float()) == 3
    assert found.first_step(sigmas[3:6]) == 3
    for other in (grid("eps", 7), sigmas[::2], sigmas * 1.01, torch.cat([sigmas, sigmas[-1:]])):
        with pytest.raises(TrajectoryMismatch, match=r"made for 8 step.* levels .*sigmas of the inversion"):
            found.first_step(other)
    found.require_latent(torch.zeros(6, 1, 8, 8))
    for shape in ((3, 1, 8, 8), (2, 1, 8, 9), (2, 4, 8, 8), (2, 8, 8)):
        with pytest.raises(TrajectoryMismatch, match=r"made for \[2, 1, 8, 8\], or whole multiples"):
            found.require_latent(torch.zeros(shape))


def test_bad_input_is_an_error_that_says_what_to_do() -> None:
    model = rows()
    source, empty, _ = words(model)
    x0 = model.draw(1, source)
    sigmas = grid("eps", 4)
    found = inverted(model, x0, sigmas, source, seed=1)
    for eta in (0.0, 1.5, math.nan):
        with pytest.raises(InvalidSetting, match=r"eta: got .* more than 0"):
            inverted(model, x0, sigmas, source, seed=1, eta=eta)
    with pytest.raises(InvalidSetting, match="Guidance of the source: got inf"):
        inverted(model, x0, sigmas, source, empty, scale=math.inf, seed=1)
    with pytest.raises(InvalidSchedule, match="batch: got 0"):
        inverted(model, x0, sigmas, source, seed=1, batch=0)
    with pytest.raises(InvalidSchedule, match="turn them round"):
        inverted(model, x0, sigmas.flip(0), source, seed=1)
    with pytest.raises(InvalidImage, match="latent to invert"):
        inverted(model, x0[0], sigmas, source, seed=1)
    with pytest.raises(InvalidSchedule, match="skip: got 4"):
        sample_edit_friendly(model, found, source, skip=4)
    with pytest.raises(InvalidSetting, match=r"skip: got 1\.1"):
        without_first_steps(sigmas, 1.1)
    with pytest.raises(TrajectoryMismatch, match="another kind of model"):
        sample_edit_friendly(rows("v"), found, source)
    model.gain = math.nan
    with pytest.raises(RetraceError, match="NaN or infinity at step 1 of 4"):
        inverted(model, x0, sigmas, source, seed=1)
    with pytest.raises(RetraceError, match="NaN or infinity at step 2 of 4"):
        sample_edit_friendly(model, replace(found, eta=1.0), source, skip=1)
