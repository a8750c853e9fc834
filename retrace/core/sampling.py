"""Sampling with DDIM, which in noise levels is one Euler step along the probability-flow ODE, and with fresh noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_latent
from .errors import InvalidSchedule, RetraceError
from .host import Conditioning, Denoiser, Parametrisation, guided, picture_share
from .schedule import check_sigmas


@dataclass(frozen=True)
class SampleStep:
    """A finished step, 1-based: ``x`` ``[B, C, h, w]`` is at level ``sigma_next``, ``denoised`` led there."""

    step: int
    total: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


Callback = Callable[[SampleStep], "Tensor | None"]
"""Called after every step; a tensor it returns takes the place of x."""

Estimate = Callable[[Tensor, float], Tensor]
"""``D(x, sigma)``: the clean estimate that a sampler follows, guided or not."""

Guide = Callable[[Tensor, float, Callable[[Tensor], Tensor]], Tensor]
"""``guide(x, sigma, predict)``: the clean estimate to use instead of ``predict(x)``."""

Step = Callable[[Tensor, Tensor, float, float], Tensor]
"""``step(x, denoised, sigma, sigma_next)``: the latent at the next level."""


def ddim_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One DDIM step (Song et al. 2021, eq. 13; k-diffusion's Euler): ``x + (x - D) / sigma * (sigma_next - sigma)``.

    ``x`` and ``denoised`` are ``[B, C, h, w]``; the levels may rise or fall. It holds for eps, v and flow models alike,
    because the direction ``(x - D) / sigma`` is the noise for the first two and the velocity for the last.
    At ``sigma_next`` 0 it returns ``denoised`` itself, and ``x`` itself where the levels are equal.

    Raises:
        InvalidSchedule: a step up from noise level 0, where the direction is 0/0.
    """
    if sigma_next == sigma:
        return x
    if sigma_next == 0:
        return denoised
    if sigma == 0:
        raise InvalidSchedule(
            f"A step from noise level 0 to {sigma_next:.4g} has no direction, because at level 0 the clean estimate "
            "is the input. Evaluate the model at the first level above 0, as retrace.inversion does."
        )
    return x + (x - denoised) / sigma * (sigma_next - sigma)


def ddpm_mean(
    x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, down: float, parametrisation: Parametrisation
) -> Tensor:
    """The mean of a step that keeps ``down`` of the old noise; ``x`` and ``denoised`` are ``[B, C, h, w]``.

    ``alpha(sigma_next) D + down eps`` with ``eps = (x - alpha(sigma) D) / sigma`` and alpha of
    :func:`picture_share` (Song et al. 2021, eq. 12).
    """
    if sigma_next == 0:
        return denoised
    noise = (x - picture_share(sigma, parametrisation) * denoised) / sigma
    return picture_share(sigma_next, parametrisation) * denoised + down * noise


def ancestral_step(
    x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor, parametrisation: Parametrisation
) -> Tensor:
    """One step of ComfyUI's ``euler_ancestral`` (eta 1): down too far, up with ``noise`` ``[B, C, h, w]``.

    It goes down to ``sigma_next ** 2 / sigma``, and fresh noise brings it back to ``sigma_next``. Mistakes of earlier
    steps fade with the noise they came with, which a deterministic path keeps. For eps and v models that is DDPM's
    posterior (Song et al. 2021, eq. 16); for flow models core scales what came down to its share at ``sigma_next``.
    """
    if sigma_next in (0, sigma):
        return ddim_step(x, denoised, sigma, sigma_next)
    low = sigma_next**2 / sigma
    down = low * picture_share(sigma_next, parametrisation) / picture_share(low, parametrisation)
    mean = ddpm_mean(x, denoised, sigma, sigma_next, down, parametrisation)
    return mean + math.sqrt(sigma_next**2 - down**2) * noise


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """A generator of the CPU that begins at ``seed``; one that is given goes on where it is."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def ancestral_steps(generator: torch.Generator, parametrisation: Parametrisation) -> Step:
    """:func:`ancestral_step` with noise drawn from ``generator``, a generator of the CPU."""

    def step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x)
        return ancestral_step(x, denoised, sigma, sigma_next, noise, parametrisation)

    return step


def guided_estimate(
    model: Denoiser, x: Tensor, sigma: Tensor | float, cond: Conditioning, uncond: Conditioning | None, scale: float
) -> Tensor:
    """The clean estimate with classifier-free guidance, two evaluations; one without ``uncond`` or at ``scale`` 1."""
    if uncond is None or scale == 1.0:
        return model.denoised(x, sigma, cond)
    without, with_text = model.denoised_each(x, sigma, [uncond, cond])
    return guided(without, with_text, scale)


def cfg(model: Denoiser, cond: Conditioning, uncond: Conditioning | None = None, scale: float = 1.0) -> Estimate:
    """Classifier-free guidance as something to sample with, see :func:`guided_estimate`."""
    return partial(guided_estimate, model, cond=cond, uncond=uncond, scale=scale)


def steered(estimate: Estimate, guide: Guide) -> Estimate:
    """``estimate`` as ``guide`` changes it, see :mod:`retrace.clip_guidance`."""
    return lambda x, sigma: guide(x, sigma, lambda moved: estimate(moved, sigma))


def sample(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    estimate: Estimate,
    step: Step = ddim_step,
    callback: Callback | None = None,
) -> Tensor:
    """Follow ``estimate`` from ``x`` ``[B, C, h, w]`` at noise level ``sigmas[0]`` down to ``sigmas[-1]``.

    ``sigmas`` is ``[N + 1]``. Steps between equal levels cost nothing and call nothing. Whatever ``model`` raises to
    stop passes through.

    Raises:
        InvalidSchedule, InvalidImage: sigmas or a latent that cannot be.
        RetraceError: the model answered NaN or infinity.
    """
    levels = [float(s) for s in check_sigmas(sigmas).tolist()]
    x = check_latent("latent", x).to(model.device)
    with torch.no_grad():
        for i, sigma, sigma_next in steps_of(levels):
            denoised = estimate(x, sigma)
            x = step(x, denoised, sigma, sigma_next)
            if callback is not None:
                replaced = callback(SampleStep(i + 1, len(levels) - 1, sigma, sigma_next, x, denoised))
                x = x if replaced is None else replaced
            require_finite(x, i + 1, len(levels) - 1, sigma)
            model.progress(i + 1, len(levels) - 1, denoised)
    return x


def sample_ddim(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """:func:`sample` with DDIM steps (Song et al. 2021) and classifier-free guidance at ``scale``.

    Two evaluations per step with ``uncond`` and a ``scale`` other than 1, otherwise one.
    """
    return sample(model, x, sigmas, cfg(model, cond, uncond, scale), callback=callback)


def steps_of(levels: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """``(number, level, next level)`` of every step that moves; those between equal levels are left out."""
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if sigma != sigma_next:
            yield i, sigma, sigma_next


def require_finite(x: Tensor, step: int, total: int, sigma: float) -> None:
    """Stop a run whose latent broke; raises :class:`RetraceError` that says at which step."""
    if not bool(torch.isfinite(x).all()):
        raise RetraceError(
            f"The model answered NaN or infinity at step {step} of {total} (noise level {sigma:.4g}), so the run was "
            "stopped. Run the model in 32-bit or bf16 (fp16 overflows in some models), check that the conditioning "
            "belongs to this model, or lower the guidance."
        )
