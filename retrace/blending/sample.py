"""Sampling under a :class:`Blend`, as a sampler of ComfyUI does it under the same blend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_choice
from ..core.host import Conditioning, Denoiser, Parametrisation, add_noise, picture_share
from ..core.sampling import Guide, SampleStep, ancestral_steps, cfg, ddim_step, sample, steered
from .blend import Blend
from .pixels import PixelBlending

Start = Literal["sampler", "forward", "noise"]


@dataclass(frozen=True)
class Sampling:
    """How :func:`sample_blended` walks.

    Args:
        highest: the highest noise level of the model's training, ``float(host.training_sigmas()[-1])``.
        scale: of classifier-free guidance; 1 is none.
        ancestral: steps with fresh noise (``euler_ancestral``) instead of Euler's.
        seed: of the noise at the start, and, one higher, of the steps, as ComfyUI's samplers on the CPU do.
        start: ``"sampler"`` begins as a KSampler does, see :func:`first_latent`; ``"forward"`` with the forward process
            at any level (the authors' code of Blended Latent Diffusion); ``"noise"`` with noise alone, also where the
            levels begin below the highest one (their script for Stable Diffusion 2).
        pixels: blends the last steps in pixels.
        guide: changes every clean estimate, see :mod:`retrace.clip_guidance`.

    Raises:
        InvalidSetting: another start.
    """

    highest: float
    scale: float = 1.0
    ancestral: bool = True
    seed: int = 0
    start: Start = "sampler"
    pixels: PixelBlending | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        check_choice("start", self.start, get_args(Start))

    def first(self, x0: Tensor, sigma: float, parametrisation: Parametrisation) -> Tensor:
        """The latent ``[B, C, h, w]`` that a run begins with at noise level ``sigma``."""
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.seed)).to(x0)
        if self.start == "noise":
            return noise * math.hypot(picture_share(sigma, parametrisation), sigma)
        if self.start == "forward":
            return add_noise(x0, noise, sigma, parametrisation)
        return first_latent(x0, noise, sigma, self.highest, parametrisation)


def sample_blended(
    model: Denoiser,
    x0: Tensor,
    sigmas: Tensor,
    blend: Blend,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    *,
    settings: Sampling,
) -> Tensor:
    """Paint ``cond`` inside the blend's mask; the rest comes back as the blend's source.

    Args:
        x0: clean latent ``[B, C, h, w]`` that noise is added to. Where ``sigmas`` starts below the highest level of the
            training it shows through, so that a scribble steers what is painted; it need not be the blend's source.
        sigmas: noise levels, descending ``[N + 1]``.
        uncond: what classifier-free guidance leads away from, two evaluations per step; see :func:`sample_ddim`.

    Returns:
        The clean latent ``[B, C, h, w]``.

    Raises:
        InvalidImage, InvalidSchedule, RetraceError: as :meth:`Blend.start` and :func:`sample_ddim`.
    """
    run = blend.start(sigmas, x0)
    steps, pixels = len(sigmas) - 1, settings.pixels
    in_pixels = steps if pixels is None else pixels.first(steps)
    start = settings.first(x0, float(sigmas[0]), model.parametrisation)
    if in_pixels > 0:
        start = run(start, float(sigmas[0]))

    def keep(done: SampleStep) -> Tensor:
        if pixels is not None and done.step > in_pixels:
            return pixels.after(run, done.step - 1, done.denoised)
        return run(done.x, done.sigma_next) if done.step < in_pixels else done.x

    estimate = cfg(model, cond, uncond, settings.scale)
    anew = torch.Generator().manual_seed(settings.seed + 1)
    step = ancestral_steps(anew, model.parametrisation) if settings.ancestral else ddim_step
    guided = estimate if settings.guide is None else steered(estimate, settings.guide)
    # The end is not part of a step: a closing step between equal levels, as the grids of the references have, is none.
    return run.finish(sample(model, start, sigmas, guided, step, keep))


def first_latent(x0: Tensor, noise: Tensor, sigma: float, highest: float, parametrisation: Parametrisation) -> Tensor:
    """What a sampler starts from at noise level ``sigma``, as ComfyUI's KSampler does.

    At the ``highest`` level of the training, where the image is as good as gone, the noise alone has the variance
    that the network saw there, ``1 + sigma^2``; below, and for flow models, it is the forward process.
    """
    if parametrisation != "flow" and (sigma > highest or math.isclose(sigma, highest, rel_tol=1e-5)):
        return x0 + noise * math.sqrt(1 + sigma * sigma)
    return add_noise(x0, noise, sigma, parametrisation)
