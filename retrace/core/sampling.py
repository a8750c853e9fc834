"""Sampling with DDIM, which in noise levels is one Euler step along the probability-flow ODE, and with fresh noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_latent
from .errors import InvalidSchedule, RetraceError
from .host import Conditioning, Denoiser, Parametrisation, guided, picture_share
from .schedule import check_sigmas

Callback = Callable[[int, float, Tensor, Tensor], "Tensor | None"]
"""``callback(step, sigma_next, x, denoised)`` after every step, 0-based; a tensor it returns takes the place of x."""

Guide = Callable[[Tensor, float, Callable[[Tensor], Tensor]], Tensor]
"""``guide(x, sigma, predict)``: the clean estimate to use in the place of ``predict(x)``."""

RETRACING_SAMPLERS = ("ddim", "euler")
"""Samplers of ComfyUI that walk an inverted path back step by step."""

STOCHASTIC_SAMPLERS = frozenset(
    {
        "euler_ancestral",
        "euler_ancestral_cfg_pp",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_2s_ancestral_cfg_pp",
        "dpmpp_sde",
        "dpmpp_sde_gpu",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "exp_heun_2_x0_sde",
        "res_multistep_ancestral",
        "res_multistep_ancestral_cfg_pp",
        "ddpm",
        "lcm",
        "er_sde",
        "seeds_2",
        "seeds_3",
        "sa_solver",
        "sa_solver_pece",
    }
)
"""Samplers of ComfyUI that add fresh noise while they run (with their default options)."""


def require_deterministic(sampler_name: str) -> None:
    """Refuse a sampler that adds noise on its way: it cannot come back to the image that was inverted.

    Names that are not in ComfyUI are refused when they say so themselves ("ancestral", "sde").

    Raises:
        InvalidSchedule: the sampler is stochastic; the message names it and those that retrace.
    """
    if sampler_name in STOCHASTIC_SAMPLERS or not {"ancestral", "sde"}.isdisjoint(sampler_name.lower().split("_")):
        raise InvalidSchedule(
            f"The sampler '{sampler_name}' adds fresh noise at every step, so it cannot retrace an inverted image. "
            f"Choose one of: {', '.join(RETRACING_SAMPLERS)}."
        )


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


def guided_estimate(
    model: Denoiser, x: Tensor, sigma: Tensor | float, cond: Conditioning, uncond: Conditioning | None, scale: float
) -> Tensor:
    """The clean estimate with classifier-free guidance, two evaluations; one without ``uncond`` or at ``scale`` 1."""
    if uncond is None or scale == 1.0:
        return model.denoised(x, sigma, cond)
    without, with_text = model.denoised_each(x, sigma, [uncond, cond])
    return guided(without, with_text, scale)


def sample_ddim(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
    callback: Callback | None = None,
    ancestral: torch.Generator | None = None,
    guide: Guide | None = None,
) -> Tensor:
    """Follow ``x`` ``[B, C, h, w]`` at noise level ``sigmas[0]`` down to ``sigmas[-1]`` (``sigmas`` is ``[N + 1]``).

    With ``uncond`` and ``scale`` other than 1 it uses classifier-free guidance, at two evaluations per step; otherwise
    one. Steps between equal levels cost none. Whatever the model raises to stop passes through.

    With ``ancestral``, a generator of the CPU, every step is an :func:`ancestral_step` with noise drawn from it.
    ``guide`` may change every estimate, see :mod:`retrace.clip_guidance`.

    Raises:
        InvalidSchedule, InvalidImage: sigmas or a latent that cannot be.
        RetraceError: the model answered NaN or infinity.
    """
    levels = [float(s) for s in check_sigmas(sigmas).tolist()]
    x = check_latent("latent", x).to(model.device)
    total = len(levels) - 1
    with torch.no_grad():
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if sigma == sigma_next:
                continue
            if guide is None:
                denoised = guided_estimate(model, x, sigma, cond, uncond, scale)
            else:
                predict = partial(guided_estimate, model, sigma=sigma, cond=cond, uncond=uncond, scale=scale)
                denoised = guide(x, sigma, predict)
            if ancestral is None:
                x = ddim_step(x, denoised, sigma, sigma_next)
            else:
                noise = torch.randn(x.shape, generator=ancestral).to(x)
                x = ancestral_step(x, denoised, sigma, sigma_next, noise, model.parametrisation)
            if callback is not None:
                replaced = callback(i, sigma_next, x, denoised)
                x = x if replaced is None else replaced
            require_finite(x, i + 1, total, sigma)
            model.progress(i + 1, total, denoised)
    return x


def require_finite(x: Tensor, step: int, total: int, sigma: float) -> None:
    """Stop a run whose latent broke; raises :class:`RetraceError` that says at which step."""
    if not bool(torch.isfinite(x).all()):
        raise RetraceError(
            f"The model answered NaN or infinity at step {step} of {total} (noise level {sigma:.4g}), so the run was "
            "stopped. Run the model in 32-bit or bf16 (fp16 overflows in some models), check that the conditioning "
            "belongs to this model, or lower the guidance."
        )
