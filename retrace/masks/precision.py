"""Mask Precision Blur: SmartBrush's family of masks from the exact shape to its bounding box.

SmartBrush (Xie et al. 2023, arXiv 2212.05034) degrades an instance mask m to m_s = GaussianBlur(m, k_s,
sigma_s) for a precision index s in 0..S, where s = 0 is the exact mask and s = S the bounding box. The table of k_s and
sigma_s is not public, so what follows is our choice:

* every connected instance is treated alone, so that its own size sets sigma and its own box is the last level;
* sigma grows in proportion to s / S and to the two sides of the box, so that twice the image gives twice the mask;
* a plain blur and threshold neither keeps the shape (thin parts vanish) nor stays in the box, and a wider blur is not
  always larger. So each level is cut to the box, and is the union of the exact mask, the level before and what the blur
  adds: level i lies inside level i + 1 for every input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_mask, check_whole
from ..core.errors import InvalidImage, InvalidSetting, Remedy, require

BINARY_CUT = 0.5
"""A soft mask counts as selected from here on when the output is binary."""
_VISIBLE = 0.5 / 255
"""Below this a soft value is 0 in any 8-bit mask: it must not stretch a bounding box."""
_FINE_SIGMA = 6.0
"""A blur this wide (in cells) is smooth enough to be computed on a coarser grid and interpolated."""


def precision_kernel(level: int, levels: int, side: int, sigma_max: float = 0.25) -> tuple[int, float]:
    """Kernel size (odd) and sigma in pixels of precision ``level`` along a box side of ``side`` pixels.

    sigma = sigma_max * side * level / levels; the kernel reaches 3 sigma to both sides.
    """
    sigma = max(sigma_max * side * level / levels, 0.1)
    return 2 * math.ceil(3 * sigma) + 1, sigma


def mask_precision(
    mask: Tensor,
    level: int,
    levels: int = 5,
    *,
    soft: bool = False,
    threshold: float = 0.2,
    sigma_max: float = 0.25,
) -> Tensor:
    """Coarsen ``mask`` to a precision level: 0 the exact mask, ``levels`` the bounding box of every instance.

    Several objects in one mask (8-connected components) grow independently and are merged by maximum.

    Args:
        mask: ``[B, H, W]``, 0..1. Binary output first cuts soft values at :data:`BINARY_CUT`. Soft output keeps them:
            level 0 is the input itself, and each instance grows with its own peak value.
        level: precision index s, 0..levels.
        levels: S, how many steps there are from the exact mask to the box.
        soft: False gives 0/1. True gives clamp(blur / (2 * threshold * peak), 0, 1), the ramp that 0/1 cuts at half.
        threshold: share of the blur's peak from which on a pixel joins, 0..1 (exclusive). Lower grows faster.
        sigma_max: sigma at the last level, as a share of the box side.

    Returns:
        ``[B, H, W]`` of the mask's type and device. Never smaller than the mask nor larger than the boxes, and never
        smaller than a lower level. An empty mask stays empty, a full one full.

    Raises:
        InvalidImage: not a mask (see :func:`retrace.core.checks.check_mask`), or one whose values are all below
            ``BINARY_CUT`` when the output is binary.
        InvalidSetting: ``level``, ``levels``, ``threshold`` or ``sigma_max`` out of range.
        MissingPackage: kornia or scipy is not installed.

    Paper: SmartBrush, Xie et al. 2023 (arXiv 2212.05034), its precision index s and m_s.
    """
    mask = check_mask("mask", mask, allow_empty=True)
    levels = check_whole("levels", levels)
    level = check_whole("level", level, minimum=0, maximum=levels)
    if not 0 < threshold < 1:
        raise InvalidSetting(f"threshold: got {threshold}, but a number between 0 and 1 is needed. 0.2 is usual.")
    if not 0 < sigma_max <= 1:
        raise InvalidSetting(f"sigma_max: got {sigma_max}, but above 0 and at most 1 is needed. 0.25 is usual.")
    if soft:
        exact = mask
    else:
        exact = (mask >= BINARY_CUT).to(mask.dtype)
        lost = (exact.amax(dim=(1, 2)) == 0) & (mask.amax(dim=(1, 2)) >= _VISIBLE)
        if lost.any():
            index = int(lost.nonzero()[0])
            raise InvalidImage(
                f"mask: its highest value is {mask[index].max().item():.3g}, but binary output needs values of at "
                f"least {BINARY_CUT}. Choose soft output to keep them. Otherwise:",
                Remedy.RAISE_MASK,
            )
    if level == 0:
        return exact.clone()
    return torch.stack([_coarsen(one, level, levels, threshold, sigma_max, soft) for one in exact])


def _coarsen(mask: Tensor, level: int, levels: int, threshold: float, sigma_max: float, soft: bool) -> Tensor:
    """One mask ``[H, W]`` at ``level`` >= 1."""
    ndimage = require("scipy.ndimage", "find the separate objects in a mask", "scipy")
    support = (mask >= _VISIBLE).cpu().numpy()
    # 8-connected: a diagonal brush stroke is one object, not a row of single pixels.
    labels, _ = ndimage.label(support, structure=[[1, 1, 1]] * 3)
    label_map = torch.from_numpy(labels).to(mask.device)
    result = mask.clone()
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        instance = torch.where(label_map[box] == index, mask[box], 0).float()
        peak = instance.max()
        shape = instance / peak
        if level == levels:
            grown = torch.ones_like(shape)
        else:
            grown = shape
            for step in range(1, level + 1) if shape.min() < 1 else ():
                grown = torch.maximum(grown, _ramp(shape, step, levels, threshold, sigma_max))
        if not soft:
            grown = (grown >= 0.5).float()
        result[box] = torch.maximum(result[box], (peak * grown).to(result.dtype))
    return result


def _ramp(shape: Tensor, level: int, levels: int, threshold: float, sigma_max: float) -> Tensor:
    """Blur one instance ``[h, w]`` inside its box: one half where the blur is ``threshold`` times its peak."""
    kornia = require("kornia.filters", "blur masks", "kornia")
    height, width = shape.shape
    (_, sigma_y), (_, sigma_x) = (precision_kernel(level, levels, side, sigma_max) for side in (height, width))
    # A kernel of 1,000 taps for a box of 1,000 pixels buys nothing: blur area means on a grid that resolves sigma.
    grid = tuple(
        math.ceil(side / max(1, int(sigma / _FINE_SIGMA))) for side, sigma in ((height, sigma_y), (width, sigma_x))
    )
    cells = shape[None, None]
    if grid != (height, width):
        cells = F.interpolate(cells, size=grid, mode="area")
    sigma_y, sigma_x = sigma_y * grid[0] / height, sigma_x * grid[1] / width
    kernel = tuple(2 * math.ceil(3 * sigma) + 1 for sigma in (sigma_y, sigma_x))
    # Outside its box an instance is 0, hence the constant border.
    blurred = kornia.gaussian_blur2d(cells, kernel, (sigma_y, sigma_x), border_type="constant")
    if grid != (height, width):
        blurred = F.interpolate(blurred, size=(height, width), mode="bilinear", align_corners=False)
    # Against its own peak: a wide blur leaves little of a thin line, which would then not grow at all.
    grown: Tensor = (blurred[0, 0] / (2 * threshold * blurred.max())).clamp(0, 1)
    return grown
