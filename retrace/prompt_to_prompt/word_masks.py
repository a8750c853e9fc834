"""Where in an image the model sees a word: cross-attention maps along its inversion (Hertz et al. 2023, figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import check_steps
from ..core.host import AttentionCall, AttentionDenoiser, Conditioning
from ..core.trajectory import Trajectory
from .control import attention_maps
from .local_blend import LocalBlend, WordMaps


def word_maps(
    model: AttentionDenoiser,
    trajectory: Trajectory,
    cond: Conditioning,
    places: Sequence[tuple[int, ...]],
    levels: int = 10,
) -> Tensor:
    """Maps ``[B, K, h, w]`` of K words for the B images of ``trajectory``, on the grid of the latent, 0..1.

    ``places[k]`` says where word k stands in the embedding of ``cond``. The model looks at the inverted latents of
    ``levels`` of the steps, evenly spread: that many evaluations per image. Each map is relative to its own maximum.

    Raises:
        InvalidSchedule: ``levels`` below 1.
    """
    check_steps("levels", levels, 1)
    images, count = trajectory.latents.shape[1], len(places)
    maps = WordMaps(LocalBlend(tuple(places) * images))

    def record(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call.kind == "cross":
            maps.add(call, attention_maps(q, k).repeat_interleave(count, dim=0))
        return call.attend(q, k, v)

    steps = [i for i in range(trajectory.steps) if float(trajectory.sigmas[i]) > 0]
    chosen = sorted({steps[int((n + 0.5) * len(steps) / levels)] for n in range(levels)})
    with torch.no_grad(), model.attention(record):
        for done, i in enumerate(chosen, 1):
            x = trajectory.latents[i].to(model.device, torch.float32)
            denoised = model.denoised(x, float(trajectory.sigmas[i]), cond)
            model.progress(done, len(chosen), denoised)
    height, width = trajectory.latents.shape[-2:]
    found = maps.mean(height, width)[0][:, None]
    # Smooth in between, so that a threshold cuts along a line and not along the cells.
    found = F.interpolate(found, size=(height, width), mode="bilinear", align_corners=False)
    found = found / found.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return found.view(images, count, height, width)


def word_mask(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """One mask ``[B, H, W]`` of ``size`` for all words of ``maps`` ``[B, K, h, w]``.

    1 where any of them exceeds ``threshold``; with threshold 0 the maps themselves, 0..1.
    """
    large = F.interpolate(maps, size=size, mode="bicubic", align_corners=False).clamp(0, 1).amax(1)
    return (large > threshold).float() if threshold > 0 else large
