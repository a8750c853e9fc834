"""Inversion on Gaussian data: orders of convergence, round trips, costs and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidImage, InvalidSchedule, InvalidSetting, RetraceError
from retrace.core.host import Origin, Parametrisation
from retrace.core.sampling import sample_ddim
from retrace.core.schedule import grid_sigmas, reference_sigmas
from retrace.core.trajectory import Trajectory
from retrace.inversion.invert import METHODS, PSNR_CAP, InversionSettings, Inverted, Method, invert, latent_psnr

from .gaussian import (
    Gaussian,
    Mean,
    centre,
    ladder,
    natural,
    number,
    numbers,
    relative,
    slope,
    stable_diffusion_sigmas,
)

pytestmark = pytest.mark.rounding

KINDS = [("eps", 10.0, 3.0), ("v", 10.0, 3.0), ("flow", 1.0, 1.0)]


def grid(kind: Parametrisation, steps: int) -> Tensor:
    if kind == "flow":
        return ladder(steps, 1.0, 1.0)
    return grid_sigmas("leading_1", stable_diffusion_sigmas(), steps)


def walked(
    model: Gaussian,
    x0: Tensor,
    sigmas: Tensor,
    method: Method,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Trajectory:
    """Up from ``x0`` with the words that :func:`centre` makes."""
    return invert(model, x0, sigmas, centre(model), InversionSettings(method, tolerance, max_iterations))


def psnr_back(model: Gaussian, path: Trajectory) -> float:
    """What sampling a trajectory back at guidance 1 loses."""
    return latent_psnr(sample_ddim(model, path.noise, path.sigmas, centre(model)), path.source)


@pytest.mark.parametrize(("kind", "top", "power"), KINDS)
def test_ddim_inversion_is_first_order(kind: Parametrisation, top: float, power: float) -> None:
    model = natural(parametrisation=kind)
    cond = centre(model)
    x0 = model.draw(2, cond)
    exact = model.exact(x0, 0.0, top, cond)
    counts = [20, 40, 80, 160]
    paths = [invert(model, x0, ladder(n, top, power), cond) for n in counts]
    errors = [relative(path.noise, exact) for path in paths]
    back = [
        relative(sample_ddim(model, path.noise, ladder(n, top, power), cond), x0)
        for n, path in zip(counts, paths, strict=True)
    ]
    assert errors[-1] < 0.015
    assert 0.85 < slope(counts, errors) < 1.15
    assert 0.85 < slope(counts, back) < 1.15


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_point_inversion_returns_to_the_start(kind: Parametrisation, steps: int, dtype: torch.dtype) -> None:
    model = natural(parametrisation=kind, dtype=dtype)
    cond = centre(model)
    x0 = model.draw(1, cond)
    sigmas = grid(kind, steps)
    path = walked(model, x0, sigmas, "fixed_point")
    assert relative(sample_ddim(model, path.noise, sigmas, cond), x0) < 1e-4
    assert max(numbers(path, "residuals")) <= 5e-6
    assert psnr_back(model, path) > 90
    assert number(path, "evaluations") <= 6 * steps


def test_fixed_point_at_25_steps_returns_better_than_ddim_at_50() -> None:
    model = natural()
    x0 = model.draw(2, centre(model))
    few = walked(model, x0, grid("eps", 25), "fixed_point", tolerance=1e-3)
    many = walked(model, x0, grid("eps", 50), "ddim")
    assert number(few, "evaluations") <= 1.2 * number(many, "evaluations")
    assert psnr_back(model, few) > psnr_back(model, many) + 3


def test_every_stored_latent_is_one_sampling_step_from_the_next() -> None:
    model = natural()
    cond = centre(model)
    x0 = model.draw(2, cond)
    settings = InversionSettings("fixed_point", tolerance=1e-7)
    path = invert(model, x0, grid("eps", 12), cond, settings, Origin("abc", "1 channel"))
    assert path.latents.shape == (13, 2, 1, 8, 8)
    assert torch.equal(path.source, x0)
    for i in range(12):
        step = sample_ddim(model, path.latents[i], path.sigmas[i : i + 2], cond)
        assert relative(step, path.latents[i + 1]) < 1e-6
    assert (path.method, path.parametrisation) == ("fixed_point", "eps")
    assert (path.fingerprint, path.latent_format) == ("abc", "1 channel")


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_fixed_point_solves_a_curved_model(kind: Parametrisation) -> None:
    model = natural(parametrisation=kind)
    model.bend = 2.0  # with this the plain iteration overshoots at the coarse steps
    cond = centre(model)
    x0 = model.draw(2, cond)
    sigmas = grid(kind, 10)
    path = walked(model, x0, sigmas, "fixed_point")
    assert max(numbers(path, "residuals")) <= 5e-6
    assert relative(sample_ddim(model, path.noise, sigmas, cond), x0) < 1e-3


@pytest.mark.parametrize("gain", [-8.0, 9.0])
def test_acceleration_solves_what_plain_iteration_blows_up(gain: float) -> None:
    """D(x) = gain x makes g(x) = x_l + (1 - gain) / 2 x, which multiplies errors by 4.5 or -4."""
    model = natural()
    model.gain = gain
    x0 = model.draw(2, centre(model))
    path = walked(model, x0, torch.tensor([1.0, 0.5]), "fixed_point")
    assert numbers(path, "residuals")[0] < 1e-8
    assert numbers(path, "iterations")[0] <= 5
    assert relative(path.noise, x0 / (1 - (1 - gain) / 2)) < 1e-8


def test_without_a_solution_the_best_iterate_is_kept() -> None:
    """gain -1 at half the level: g(x) = x_l + x has no fixed point, every iterate misses by x_l."""
    model = natural()
    model.gain = -1.0
    x0 = model.draw(1, centre(model))
    path = walked(model, x0, torch.tensor([1.0, 0.5]), "fixed_point")
    assert numbers(path, "residuals")[0] == pytest.approx(1, abs=1e-6)
    assert numbers(path, "iterations")[0] <= 5  # it notices and stops
    assert bool(torch.isfinite(path.latents).all())


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_spdinv_improves_on_ddim(kind: Parametrisation) -> None:
    model = natural(parametrisation=kind)
    x0 = model.draw(1, centre(model))
    sigmas = grid(kind, 10)
    plain, solved = walked(model, x0, sigmas, "ddim"), walked(model, x0, sigmas, "spdinv")
    assert psnr_back(model, solved) > psnr_back(model, plain) + 3


def test_costs_are_counted_exactly() -> None:
    model = natural()
    x0 = model.draw(3, centre(model))
    sigmas = grid("eps", 8)
    report = walked(model, x0, sigmas, "ddim").report
    assert (report["evaluations"], report["backwards"], report["iterations"]) == (3 * 8, 0, [1] * 8)
    assert model.evaluations == 3 * 8
    assert model.steps[-1] == (8, 8)

    report = walked(model, x0, sigmas, "fixed_point", max_iterations=2).report
    assert report["evaluations"] == 3 * 2 * 8 and report["iterations"] == [2] * 8
    path = walked(model, x0, sigmas, "fixed_point")
    assert number(path, "evaluations") == 3 * sum(numbers(path, "iterations"))

    model.backwards = 0
    report = walked(model, x0, sigmas, "spdinv", tolerance=1e-12, max_iterations=4).report
    assert report["evaluations"] == 3 * (1 + 4) * 8  # the DDIM start, then four looks
    assert report["backwards"] == model.backwards == 3 * 3 * 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_batch_equals_its_images_one_by_one(method: Method, kind: Parametrisation) -> None:
    model = natural(parametrisation=kind)
    model.bend = 0.5
    cond = centre(model)
    x0 = model.draw(3, cond) * torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    together = walked(model, x0, grid(kind, 8), method)
    for b in range(3):
        alone = walked(model, x0[b : b + 1], grid(kind, 8), method)
        assert relative(together.latents[:, b : b + 1], alone.latents) < 1e-10


def test_the_reference_grid_with_its_closing_no_op() -> None:
    model = natural()
    cond = centre(model)
    x0 = model.draw(1, cond)
    sigmas = reference_sigmas("leading_0", stable_diffusion_sigmas(), 10)
    path = invert(model, x0, sigmas, cond)
    assert path.report["evaluations"] == 9
    assert torch.equal(path.latents[-1], path.latents[-2])


def test_ddim_is_the_step_of_the_null_text_code() -> None:
    """z_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps with eps = eps(z_{t-1}, t), written out in the DDPM scale."""
    model = natural()
    cond = centre(model)
    training = stable_diffusion_sigmas()
    sigmas = reference_sigmas("leading_1", training, 10)
    alphas = 1 / (1 + sigmas.flip(0) ** 2)
    z = model.draw(1, cond)
    path = invert(model, z / alphas[0].sqrt(), sigmas, cond)
    for i in range(10):
        low, high, sigma = alphas[i], alphas[i + 1], float(sigmas.flip(0)[i + 1])
        eps = (z / high.sqrt() - model.denoised(z / high.sqrt(), sigma, cond)) / sigma
        clean = (z - (1 - low).sqrt() * eps) / low.sqrt()
        z = high.sqrt() * clean + (1 - high).sqrt() * eps
        assert relative(path.latents[-2 - i] * high.sqrt(), z) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_interrupt_passes_through_and_inner_iterations_hear_it(method: Method) -> None:
    class Interrupt(BaseException):
        pass

    def stop(step: int) -> None:
        raise Interrupt

    model = natural()
    model.on_progress = stop
    with pytest.raises(Interrupt):
        walked(model, model.draw(1, centre(model)), grid("eps", 5), method)
    assert model.evaluations == (2 if method == "spdinv" else 1)


def test_bad_input_is_an_error_that_says_what_to_do() -> None:
    model = natural()
    cond = centre(model)
    x0 = model.draw(1, cond)
    sigmas = grid("eps", 4)
    with pytest.raises(InvalidSetting, match="got 'euler', but one of ddim, fixed_point, spdinv"):
        walked(model, x0, sigmas, "euler")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="tolerance: got -1"):
        walked(model, x0, sigmas, "fixed_point", tolerance=-1)
    with pytest.raises(InvalidSetting, match="max_iterations: got 0"):
        walked(model, x0, sigmas, "fixed_point", max_iterations=0)
    with pytest.raises(InvalidSchedule, match="They ascend: turn them round"):
        invert(model, x0, sigmas.flip(0), cond)
    with pytest.raises(InvalidImage, match=r"latent to invert.*NaN or infinite"):
        invert(model, x0 * float("inf"), sigmas, cond)
    assert model.evaluations == 0
    for method in METHODS:
        with pytest.raises(RetraceError, match=r"NaN or infinity at step 1 of 4"):
            invert(model, x0, sigmas, Mean(cond.embedding * float("nan")), InversionSettings(method))


def test_only_spdinv_needs_gradients() -> None:
    assert [method for method in METHODS if InversionSettings(method).needs_gradients] == ["spdinv"]


def test_the_report_of_an_inversion() -> None:
    model = natural()
    path = walked(model, model.draw(2, centre(model)), grid("eps", 4), "fixed_point")
    lines = Inverted(path, 41.234, 38.0).text(321).splitlines()
    assert lines[:3] == [
        "fixed_point, 4 steps, 2 image(s)",
        "return, latent    41.23 dB PSNR",
        "return, image     38.00 dB PSNR (vs VAE)",
    ]
    assert lines[3].startswith(f"{path.report['evaluations']} network evaluations, ")
    assert lines[4] == f"largest residual of a step {max(numbers(path, 'residuals')):.1e}"
    assert lines[5:] == ["peak memory 321 MB"]
    unseen = Inverted(path).text()
    assert "return" not in unseen and "memory" not in unseen


def test_latent_psnr_known_values() -> None:
    reference = torch.tensor([0.0, 1.0, 2.0, 4.0]).view(1, 1, 2, 2)
    assert latent_psnr(reference, reference) == PSNR_CAP
    assert latent_psnr(reference + 0.4, reference) == pytest.approx(20, abs=1e-4)
    pair = torch.cat([reference, reference])
    off = torch.cat([reference + 0.4, reference + 0.04])
    assert latent_psnr(off, pair) == pytest.approx(30, abs=1e-4)
