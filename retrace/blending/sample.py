"""Sampling under a :class:`Blend`: what a KSampler does with a model that Blend Step patched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.host import Conditioning, Denoiser, Parametrisation, add_noise
from ..core.sampling import Guide, sample_ddim
from .blend import Blend


def sample_blended(
    model: Denoiser,
    x0: Tensor,
    sigmas: Tensor,
    blend: Blend,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
    *,
    highest: float,
    ancestral: bool = True,
    seed: int = 0,
    guide: Guide | None = None,
) -> Tensor:
    """Paint ``cond`` inside the blend's mask; the rest comes back as the blend's source.

    Args:
        x0: clean latent ``[B, C, h, w]`` that noise is added to. Where ``sigmas`` starts below the highest level of the
            training it shows through, so that a scribble steers what is painted; it need not be the blend's source.
        sigmas: noise levels, descending ``[N + 1]``.
        uncond, scale: classifier-free guidance, two evaluations per step; see :func:`sample_ddim`.
        highest: the highest noise level of the model's training, ``float(host.training_sigmas()[-1])``.
        ancestral: steps with fresh noise (``euler_ancestral``) instead of Euler's.
        seed: of the noise at the start, and, one higher, of the steps, as ComfyUI's samplers on the CPU do.
        guide: changes every clean estimate, see :mod:`retrace.clip_guidance`.

    Returns:
        The clean latent ``[B, C, h, w]``.

    Raises:
        InvalidImage, InvalidSchedule, RetraceError: as :meth:`Blend.start` and :func:`sample_ddim`.
    """
    run = blend.start(sigmas, x0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    start = run(first_latent(x0, noise, float(sigmas[0]), highest, model.parametrisation), float(sigmas[0]))

    closing = len(sigmas) - 2

    def keep(step: int, sigma: float, after: Tensor, _: Tensor) -> Tensor:
        return after if step == closing else run(after, sigma)

    anew = torch.Generator().manual_seed(seed + 1) if ancestral else None
    # The end is not part of a step: a closing step between equal levels, as the grids of the references have, is none.
    return run.finish(sample_ddim(model, start, sigmas, cond, uncond, scale, keep, anew, guide))


def first_latent(x0: Tensor, noise: Tensor, sigma: float, highest: float, parametrisation: Parametrisation) -> Tensor:
    """What a sampler starts from at noise level ``sigma``, as ComfyUI's KSampler does.

    At the ``highest`` level of the training, where the picture is as good as gone, the noise alone has the variance
    that the network saw there, ``1 + sigma^2``; below, and for flow models, it is the forward process.
    """
    if parametrisation != "flow" and (sigma > highest or math.isclose(sigma, highest, rel_tol=1e-5)):
        return x0 + noise * math.sqrt(1 + sigma * sigma)
    return add_noise(x0, noise, sigma, parametrisation)
