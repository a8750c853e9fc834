"""Edit-friendly DDPM inversion: the noise of every step with which stochastic sampling comes back to an image.

Huberman-Spiegelglas et al. 2024, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations" (arXiv 2304.06140),
algorithm 1. Every latent is the image with a noise of its own, not a point on one path; the noise of a step is what the
posterior mean of one latent lacks to the next. Such noises are stronger than fresh ones and hold the layout of the
picture, so that other words with the same noises edit it. Another seed gives another edit.

With D = D(x, s) and alpha(s) = 1 (1 - s for flow models), a DDPM step from level s to s' is, for every kind of model,

    x' = alpha(s') D + down eps + up z,    eps = (x - alpha(s) D) / s,    down^2 + up^2 = s'^2,
    up = eta s' sqrt(1 - (s' alpha(s) / (s alpha(s')))^2).

For eps and v models that is the ancestral Euler step of k-diffusion; in the variance-preserving scale it is eq. 12 and
16 of Song et al. 2021 (DDIM), at eta 1 the posterior of DDPM.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.checks import check_latent, check_steps
from ..core.errors import InvalidSetting, TrajectoryMismatch
from ..core.host import Conditioning, Denoiser, Origin, Parametrisation, add_noise, picture_share
from ..core.report import memory_lines
from ..core.sampling import Callback, SampleStep, ddpm_mean, generator_of, guided_estimate, require_finite, steps_of
from ..core.schedule import check_sigmas, shown
from ..core.trajectory import Trajectory


@dataclass(frozen=True)
class EditFriendly:
    """An image as noises: what :func:`sample_edit_friendly` adds at every step. All tensors are on the CPU.

    ``trajectory`` holds the independently noised latents. ``noises`` is ``[N, B, C, h, w]``: number i belongs to the
    step from ``sigmas[i]`` to ``sigmas[i + 1]``; a step to level 0 and one between equal levels have none (zeros).
    ``remainder`` ``[B, C, h, w]`` is added after a step to level 0: what the clean estimate of the last latent lacks to
    the image (the paper's code leaves it out, and misses the image by it). ``scale`` is the guidance of the source.
    """

    trajectory: Trajectory
    noises: Tensor = field(repr=False)
    remainder: Tensor = field(repr=False)
    scale: float
    eta: float

    def text(self, peak_megabytes: int | None = None) -> str:
        """What the inversion cost and what its noises are like, in lines of text."""
        path = self.trajectory
        steps, images = self.noises.shape[:2]
        together = int(path.fact("batch"))
        at_a_time = f"{together} steps at a time" if together > 1 else "one step at a time"
        lines = [
            f"edit_friendly, {steps} steps, {images} image(s), guidance {self.scale:g}, seed {path.report['seed']}",
            f"start at noise level {float(path.sigmas[0]):.3f}",
            f"{path.fact('evaluations'):g} network evaluations, {at_a_time}, {path.fact('seconds'):.1f} s",
        ]
        strengths = path.report["strengths"]
        if isinstance(strengths, list) and strengths:
            average = sum(strengths) / len(strengths)
            lines.append(f"strength of the noises: {average:.2f} on average, {max(strengths):.2f} at most (fresh: 1)")
        return "\n".join([*lines, *memory_lines(peak_megabytes)])

    def first_step(self, sigmas: Tensor) -> int:
        """The number of the step that sampling along ``sigmas`` ``[n + 1]``, some of the inverted levels, begins with.

        Raises:
            TrajectoryMismatch: other levels, for which there are no noises.
        """
        own = self.trajectory.sigmas
        asked = sigmas.detach().to(own)
        for first in range(len(own) - len(asked) + 1):
            if torch.allclose(own[first : first + len(asked)], asked, rtol=1e-5, atol=1e-6):
                return first
        raise TrajectoryMismatch(
            f"The sampler asks for {len(asked) - 1} step(s) with the noise levels {shown(asked)}, but the noises were "
            f"made for {len(own) - 1} step(s) with the noise levels {shown(own)}. Sample with the sigmas "
            "of the inversion, or invert again with the scheduler and the steps that you want."
        )

    def require_latent(self, x: Tensor) -> None:
        """Raise :class:`TrajectoryMismatch` unless ``x`` ``[B, C, h, w]`` is the inverted batch, once or repeated."""
        images, *size = self.noises.shape[1:]
        if x.ndim != 4 or list(x.shape[1:]) != size or len(x) % images:
            raise TrajectoryMismatch(
                f"The sampler works on latents of shape {list(x.shape)}, but the noises were made for "
                f"{[images, *size]}, or whole multiples of that batch. Sample the latent that the inversion gave."
            )

    def step(self, number: int, x: Tensor, denoised: Tensor) -> Tensor:
        """Step ``number`` from ``x`` with the stored noise; both tensors are ``[k B, C, h, w]``, images in turn."""
        sigma, sigma_next = self.trajectory.sigmas[number : number + 2].tolist()
        if sigma == sigma_next:
            return x
        down, up = ddpm_levels(sigma, sigma_next, self.eta, self.trajectory.parametrisation)
        kick = self.noises[number] * up if up else self.remainder
        mean = ddpm_mean(x, denoised, sigma, sigma_next, down, self.trajectory.parametrisation)
        return mean + kick.to(x).repeat(len(x) // len(kick), 1, 1, 1)


def ddpm_levels(sigma: float, sigma_next: float, eta: float, parametrisation: Parametrisation) -> tuple[float, float]:
    """``(down, up)`` of a DDPM step: how much of the old noise and of a new one the next latent has."""
    if sigma_next == 0:
        return 0.0, 0.0
    keeps = sigma_next * picture_share(sigma, parametrisation) / (sigma * picture_share(sigma_next, parametrisation))
    up = eta * sigma_next * math.sqrt(1 - keeps**2)
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


@dataclass(frozen=True)
class EditFriendlySettings:
    """How to find the noises.

    Attributes:
        scale: the guidance of the source.
        seed: of the independent noises, or a generator to draw them from.
        batch: how many steps share a call of the model.
        eta: in (0, 1], how much of the noise is new at every step; 1 is DDPM.

    Raises:
        InvalidSetting: a guidance or eta that cannot be.
        InvalidSchedule: a batch below 1.
    """

    scale: float = 3.5
    seed: int | torch.Generator = 0
    batch: int = 4
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_steps("batch", self.batch, 1)
        if not math.isfinite(self.scale):
            raise InvalidSetting(f"Guidance of the source: got {self.scale}, but a number is needed (try 3.5).")
        if not 0 < self.eta <= 1:
            raise InvalidSetting(
                f"eta: got {self.eta}, but more than 0 and at most 1 is needed: without noise (0) there is nothing to "
                "store. 1 is DDPM."
            )


def invert_edit_friendly(
    model: Denoiser,
    x0: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    settings: EditFriendlySettings | None = None,
    origin: Origin | None = None,
) -> EditFriendly:
    """Find the noises with which DDPM sampling along ``sigmas`` ``[N + 1]`` returns to ``x0`` ``[B, C, h, w]``.

    ``x0`` is in the model's scale and stands for the last level, also where that is not 0. Nothing is walked, so the
    predictions of several steps are one call of the model: what depends on the noise level of a call (time ranges,
    patches) needs ``batch`` 1. So do conditions with an embedding per image, which get it here. With ``uncond`` and a
    scale other than 1 the source is guided, at two evaluations per step and image; otherwise one. Steps between equal
    levels cost none.

    The noise of a level depends on the seed and its place, counted from the last level: leaving out the first steps
    leaves the noises of the others as they are.

    Args:
        model: the model.
        x0: the latent of the image.
        sigmas: the descending schedule that is sampled later.
        cond: the words that describe the image as it is.
        uncond: the words that guidance leads away from.
        settings: guidance, seed and eta.
        origin: the model, for the trajectory.

    Returns:
        The noises; the ``report`` of their trajectory holds ``steps``, ``evaluations``, ``seconds``, ``scale``,
        ``seed``, ``batch`` and ``strengths``: the root mean square of the noise of every step that has one (1 if it
        were fresh).

    Raises:
        InvalidSchedule, InvalidImage: sigmas or a latent that cannot be.
        RetraceError: a model that answers NaN.
    """
    settings, origin = settings or EditFriendlySettings(), origin or Origin()
    levels = [float(s) for s in check_sigmas(sigmas).tolist()]
    x0 = check_latent("latent to invert", x0)
    kind = model.parametrisation
    x0 = x0.detach().to(model.device, x0.dtype if x0.dtype == torch.float64 else torch.float32)
    scale = 1.0 if uncond is None else float(settings.scale)
    batch = 1 if any(len(c.embedding) > 1 for c in (cond, uncond) if c is not None) else settings.batch
    started, before = time.perf_counter(), model.evaluations
    latents = _noised(x0, levels, settings.seed, kind)
    noises, remainder = torch.zeros_like(latents[1:]), torch.zeros_like(x0)
    moving = [i for i, _, _ in steps_of(levels)]
    with torch.no_grad():
        for start in range(0, len(moving), batch):
            together = moving[start : start + batch]
            x = latents[together].flatten(0, 1)
            sigma = torch.tensor([levels[i] for i in together for _ in x0], dtype=x0.dtype, device=x0.device)
            estimates = guided_estimate(model, x, sigma, cond, uncond, scale).unflatten(0, (len(together), len(x0)))
            for i, denoised in zip(together, estimates, strict=True):
                require_finite(denoised, i + 1, len(noises), levels[i])
                down, up = ddpm_levels(levels[i], levels[i + 1], settings.eta, kind)
                missing = latents[i + 1] - ddpm_mean(latents[i], denoised, levels[i], levels[i + 1], down, kind)
                if up:
                    noises[i] = missing / up
                else:
                    remainder = missing
            model.progress(start + len(together), len(moving), estimates[-1])
    report: dict[str, float | int | str | list[float] | list[int]] = {
        "steps": len(noises),
        "evaluations": model.evaluations - before,
        "seconds": round(time.perf_counter() - started, 3),
        "scale": scale,
        "seed": settings.seed if isinstance(settings.seed, int) else settings.seed.initial_seed(),
        "batch": batch,
        "strengths": [float(noises[i].square().mean().sqrt()) for i in moving if levels[i + 1] > 0],
    }
    trajectory = Trajectory(
        sigmas.cpu().clone(), latents.cpu(), kind, origin.fingerprint, "edit_friendly", report, origin.latent_format
    )
    return EditFriendly(trajectory, noises.cpu(), remainder.cpu(), scale, settings.eta)


def sample_edit_friendly(
    model: Denoiser,
    found: EditFriendly,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
    skip: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample ``[B, C, h, w]`` with the noises of ``found``, from the latent that ``skip`` of its N steps lead to.

    With the words and the guidance of the inversion it returns the image, with others an edit; the more steps are left
    out, the closer it stays (the paper: 36 of 100, guidance 15). Guidance, cost and ``callback`` are as in
    :func:`sample_ddim`.

    Raises:
        TrajectoryMismatch: noises of another kind of model.
        InvalidSchedule: a ``skip`` that leaves no step.
        RetraceError: the model answered NaN or infinity.
    """
    found.trajectory.require_kind(model.parametrisation, "")
    levels = found.trajectory.sigmas.tolist()
    total = len(levels) - 1
    check_steps("skip", skip, 0, total - 1)
    x = found.trajectory.latents[skip].to(model.device)
    with torch.no_grad():
        for i, sigma, sigma_next in steps_of(levels):
            if i < skip:
                continue
            denoised = guided_estimate(model, x, sigma, cond, uncond, scale)
            x = found.step(i, x, denoised)
            if callback is not None:
                replaced = callback(SampleStep(i + 1 - skip, total - skip, sigma, sigma_next, x, denoised))
                x = x if replaced is None else replaced
            require_finite(x, i + 1, total, sigma)
            model.progress(i + 1 - skip, total - skip, denoised)
    return x


def without_first_steps(sigmas: Tensor, skip: float) -> Tensor:
    """The levels ``[n + 1]`` that are left of ``sigmas`` ``[N + 1]`` without the share ``skip`` of its steps.

    ``skip`` is 0 to 1; at least one step is left. Raises :class:`InvalidSetting` for another share.
    """
    if not 0 <= skip <= 1:
        raise InvalidSetting(f"skip: got {skip}, but a share of the steps is needed, 0 (none) to 1 (all but the last).")
    steps = len(check_sigmas(sigmas)) - 1
    return sigmas[min(round(skip * steps), steps - 1) :]


def _noised(x0: Tensor, levels: list[float], seed: int | torch.Generator, parametrisation: Parametrisation) -> Tensor:
    """``x0`` at every level, each with a noise of its own, ``[N + 1, B, C, h, w]``; drawn from the lowest level up."""
    generator = generator_of(seed)
    latents = []
    for level in reversed(levels):
        if level == levels[-1]:
            latents.append(x0)
        else:
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
            latents.append(add_noise(x0, noise, level, parametrisation))
    return torch.stack(latents[::-1])
