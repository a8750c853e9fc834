"""Masks on the latent grid, and how Blended Latent Diffusion shrinks them over the steps."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_choice, check_mask, check_steps, check_whole, describe
from ..core.errors import InvalidImage

LatentMaskMode = Literal["max", "area", "any", "nearest"]


def latent_mask(
    mask: Tensor, factor: int = 8, mode: LatentMaskMode = "max", size: tuple[int, int] | None = None
) -> Tensor:
    """Reduce a pixel mask to the latent grid.

    Args:
        mask: ``[B, H, W]``, 0..1.
        factor: pixels per latent cell, 8 for every SD model.
        mode: ``max`` takes the highest value in a cell, so that a line of one pixel survives and soft values stay;
            ``any`` the same but 1 wherever anything is selected; ``area`` the selected share of the cell; ``nearest``
            the pixel in the middle of each cell, as the reference code of Blended Latent Diffusion does (PIL's
            ``NEAREST``; thin lines get lost).
        size: the latent's (h, w) where H and W are no multiples of ``factor``; ``factor`` is then not used.

    Returns:
        ``[B, H/factor, W/factor]`` or ``[B, h, w]``.

    Raises:
        InvalidImage: not a mask, or a size that ``factor`` does not divide.
        InvalidSetting: another mode, or ``factor`` below 1.
    """
    mask = check_mask("mask", mask, allow_empty=True)
    check_choice("mode", mode, get_args(LatentMaskMode))
    if size is None:
        factor = check_whole("factor", factor)
        if mask.shape[1] % factor or mask.shape[2] % factor:
            raise InvalidImage(
                f"mask: got {describe(mask)}, i.e. {mask.shape[2]}x{mask.shape[1]} pixels (width x height), but "
                f"multiples of {factor} are needed. Crop or resize image and mask to such a size, or give the "
                "size of the latent."
            )
        size = (mask.shape[1] // factor, mask.shape[2] // factor)
    return to_grid(mask, size, mode)


def to_grid(mask: Tensor, size: tuple[int, int], mode: LatentMaskMode) -> Tensor:
    """:func:`latent_mask` to ``size`` ``(h, w)`` of a mask ``[B, H, W]`` that has been checked."""
    # The adaptive pools let neighbouring cells share a pixel where the sizes do not divide: none is skipped.
    cells = mask[:, None]
    if mode == "nearest":
        return F.interpolate(cells, size=size, mode="nearest-exact")[:, 0]
    if mode == "area":
        return F.adaptive_avg_pool2d(cells, size)[:, 0]
    highest = F.adaptive_max_pool2d(cells, size)[:, 0]
    return (highest > 0).to(mask.dtype) if mode == "any" else highest


def shrink_schedule(mask_latent: Tensor, steps: int, stages: int) -> list[Tensor]:
    """The mask of every step: thick at first, so that a thin mask leaves the object room to form, exact at the end.

    Stage i of ``stages`` dilates by a square of 3 + 2i cells, largest first; the original mask closes the list. With 50
    steps and 3 stages: 7x7 for steps 0-12, 5x5 for 13-25, 3x3 for 26-38, the original for 39-49.

    Soft values dilate by maximum, so that a half-selected cell grows half-selected. The authors' code instead dilates
    everything above 0 to 1; ``(mask_latent > 0).float()`` gives its dilations, but also a hard last mask.

    Args:
        mask_latent: ``[B, h, w]``, 0..1.
        steps: how many sampling steps there are.
        stages: how many dilations; 0 gives the original at every step.

    Returns:
        ``steps`` tensors ``[B, h, w]``; steps of one stage share one tensor.

    Raises:
        InvalidImage: not a mask.
        InvalidSchedule: ``steps`` below 1.
        InvalidSetting: ``stages`` below 0.

    Paper: Blended Latent Diffusion, Avrahami et al. 2023, its progressive mask shrinking.
    """
    mask_latent = check_mask("mask", mask_latent, allow_empty=True)
    steps = check_steps("steps", steps)
    stages = check_whole("stages", stages, minimum=0)
    return shrunk(mask_latent, steps, stages)


def shrunk(mask_latent: Tensor, steps: int, stages: int) -> list[Tensor]:
    """:func:`shrink_schedule` of what has been checked."""
    kernels = [3 + 2 * i for i in reversed(range(stages))]
    masks = [F.max_pool2d(mask_latent[:, None], k, stride=1, padding=k // 2)[:, 0] for k in kernels] + [mask_latent]
    parts = len(masks)
    # The reference divides like this. With few steps it never comes to the original mask, which must close the run:
    # then the parts are counted from the end.
    length = steps // parts + 1
    if (steps - 1) // length == parts - 1:
        return [masks[step // length] for step in range(steps)]
    return [masks[parts - 1 - (steps - 1 - step) * parts // steps] for step in range(steps)]
