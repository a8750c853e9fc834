"""Inversion: from the latent of an image up to the noise that deterministic sampling turns back into it.

Sampling steps from level h (high) down to l (low) with the direction ``d(x, sigma) = (x - D(x, sigma)) / sigma``
taken at the high end. Undoing such a step means to solve ``x_h = g(x_h)`` with ``g(x) = x_l + d(x, sigma_h) (sigma_h
- sigma_l)``:

- ``ddim`` does not solve, it takes the direction at the low latent;
- ``fixed_point`` iterates g, with Anderson acceleration (AIDI: Pan et al. 2023; ReNoise: Garibi et al. 2024);
- ``spdinv`` descends on ``|g(x) - x|^2`` with gradients through the model (Li et al. 2024, eq. 12).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_latent
from ..core.errors import InvalidSetting
from ..core.host import Conditioning, Denoiser, Origin
from ..core.report import memory_lines
from ..core.sampling import require_finite, steps_of
from ..core.schedule import check_sigmas
from ..core.trajectory import Trajectory
from .steps import Problem, SolvedStep, ddim, fixed_point, predict, spdinv

Method = Literal["ddim", "fixed_point", "spdinv"]
METHODS: tuple[Method, ...] = get_args(Method)
PSNR_CAP = 100.0
"""The most dB that a comparison of latents gives: nothing differs any more."""


@dataclass(frozen=True)
class InversionSettings:
    """How to invert; see :func:`invert`. None leaves ``tolerance`` and ``max_iterations`` to the method.

    Raises:
        InvalidSetting: an unknown method, a tolerance or cap that cannot be.
    """

    method: Method = "ddim"
    tolerance: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidSetting(f"Inversion method: got '{self.method}', but one of {', '.join(METHODS)} is needed.")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise InvalidSetting(
                f"Inversion tolerance: got {self.tolerance}, but a number above 0 is needed (try 5e-6)."
            )
        if self.max_iterations is not None and self.max_iterations < 1:
            raise InvalidSetting(f"Inversion max_iterations: got {self.max_iterations}, but at least 1 is needed.")

    @property
    def needs_gradients(self) -> bool:
        """Whether the host has to run with ``gradients=True``."""
        return self.method == "spdinv"


def invert(
    model: Denoiser,
    x0: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    settings: InversionSettings | None = None,
    origin: Origin | None = None,
) -> Trajectory:
    """Walk ``sigmas`` upwards from the latent ``x0`` of an image, at guidance 1.

    ``ddim``: one evaluation per step, of the low latent taken for one at the high level (as null-text inversion does,
    Mokady et al. 2023; eps and v models see it with the variance it has, ``x_l sqrt((1 + sigma_h^2) / (1 +
    sigma_l^2))`` here). The other usual reading is Euler with the low latent at the low level; both are of first order.
    For eps models this is diffusers' DDIMInverseScheduler to rounding; that one converts a v prediction at the low
    level instead.

    ``fixed_point``: each sample of the batch iterates by itself and keeps its best iterate; it is finished when a
    sampling step would miss the lower latent by at most ``tolerance`` (5e-6) of that latent's norm, when it stalls,
    or after ``max_iterations`` (20). The batch is evaluated until the last sample is finished.

    ``spdinv``: AdamW with learning rate 1e-3 on latents of unit variance, started from ``ddim``, until the mean squared
    residual of the sample is below ``tolerance`` (5e-6) or for ``max_iterations`` (25), one forward and one backward
    each (no backward after the last). It returns the best iterate; the reference code takes one more optimiser step
    than it looks at. No step has a larger residual than ``ddim`` would leave from there.

    Args:
        model: the model; never asked at level 0, where eps is 0/0 in terms of the clean estimate: the step that leaves
            it is evaluated at the first level above.
        x0: ``[B, C, h, w]`` in the model's scale. It stands for the last level of ``sigmas``; where that is a paper's
            lowest training level, :func:`~retrace.core.host.from_variance_preserving` gives what the paper means.
        sigmas: ``[N + 1]``, the descending schedule that is sampled later.
        cond: the words that describe the image.
        settings: how to solve the steps; ``ddim`` by default.
        origin: the model, for the trajectory.

    Returns:
        The trajectory; its ``report`` holds ``evaluations`` and ``backwards`` (per image and condition), ``seconds``,
        ``steps``, and lists per step, from the image upwards, of ``iterations`` and ``residuals`` (largest of the
        batch, relative as above; not for ``ddim``, which does not know them).

    Raises:
        InvalidSchedule, InvalidImage: sigmas or a latent that cannot be.
        RetraceError: a model that answers NaN.
    """
    settings, origin = settings or InversionSettings(), origin or Origin()
    levels = [float(s) for s in check_sigmas(sigmas).tolist()][::-1]
    x0 = check_latent("latent to invert", x0)
    x = x0.detach().to(model.device, x0.dtype if x0.dtype == torch.float64 else torch.float32)
    started, evaluations_before = time.perf_counter(), model.evaluations
    count = len(levels) - 1
    path = [x] * (count + 1)  # the closing no-op of the P2P grid repeats the image
    solved: list[SolvedStep] = []
    with torch.no_grad():
        below: tuple[float, Tensor] | None = None  # level and direction of the step before the last
        for i, low, high in steps_of(levels):
            problem = Problem(model, cond, x, low, high, partial(model.progress, i, count))
            last = solved[-1] if solved else None
            step = _solve(problem, settings, last, below)
            below = (low, last.direction) if last is not None else None
            x = step.x
            require_finite(x, i + 1, count, high)
            path[i + 1] = x
            solved.append(step)
            model.progress(i + 1, count, step.denoised)
    report: dict[str, float | int | str | list[float] | list[int]] = {
        "steps": count,
        "evaluations": model.evaluations - evaluations_before,
        "backwards": sum(s.backwards for s in solved) * len(x0),
        "iterations": [s.iterations for s in solved],
        "seconds": round(time.perf_counter() - started, 3),
    }
    if settings.method != "ddim":
        report["residuals"] = [s.residual for s in solved if s.residual is not None]
    latents = torch.stack([p.cpu() for p in reversed(path)])
    return Trajectory(
        sigmas.cpu().clone(),
        latents,
        model.parametrisation,
        origin.fingerprint,
        settings.method,
        report,
        origin.latent_format,
    )


def _solve(
    problem: Problem, settings: InversionSettings, last: SolvedStep | None, below: tuple[float, Tensor] | None
) -> SolvedStep:
    if settings.method == "ddim":
        return ddim(problem)
    if settings.method == "fixed_point":
        guess = predict(last, below, problem.low, problem.high)
        return fixed_point(problem, guess, settings.tolerance or 5e-6, settings.max_iterations or 20)
    return spdinv(problem, settings.tolerance or 5e-6, settings.max_iterations or 25)


@dataclass(frozen=True)
class Inverted:
    """An inversion, and how well sampling it back at guidance 1 returns, in dB (None where nobody looked).

    ``latent_psnr`` compares latents, ``image_psnr`` decoded images with what the autoencoder alone keeps.
    """

    trajectory: Trajectory
    latent_psnr: float | None = None
    image_psnr: float | None = None

    def text(self, peak_megabytes: int | None = None) -> str:
        """What the inversion cost and how well it returns, in lines of text."""
        lines = [
            f"{self.trajectory.method}, {self.trajectory.steps} steps, {self.trajectory.latents.shape[1]} image(s)"
        ]
        if self.latent_psnr is not None:
            lines.append(f"return, latent   {self.latent_psnr:6.2f} dB PSNR")
        if self.image_psnr is not None:
            lines.append(f"return, image    {self.image_psnr:6.2f} dB PSNR (vs VAE)")
        lines.append(self.trajectory.cost())
        residuals = self.trajectory.report.get("residuals")
        if isinstance(residuals, list) and residuals:
            lines.append(f"largest residual of a step {max(residuals):.1e}")
        return "\n".join([*lines, *memory_lines(peak_megabytes)])


def latent_psnr(x: Tensor, reference: Tensor) -> float:
    """PSNR in dB of latents ``[B, C, h, w]``, peak = range of the reference, mean over the batch, at most
    :data:`PSNR_CAP`."""
    error = (x - reference).flatten(1).pow(2).mean(dim=1)
    peak = reference.flatten(1).amax(dim=1) - reference.flatten(1).amin(dim=1)
    ratio = (peak.pow(2) / error.clamp(min=1e-38)).clamp(min=1e-38)
    return float((10 * ratio.log10()).clamp(max=PSNR_CAP).mean())
