"""Feathered mask edges: across the border, or only inward so that nothing outside the mask is touched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.checks import check_mask
from ..core.errors import InvalidSetting, require


def check_radius(radius_px: float) -> float:
    """Return ``radius_px`` when it is a number of pixels. Raises :class:`InvalidSetting` for anything else."""
    if not (isinstance(radius_px, (int, float)) and math.isfinite(radius_px) and radius_px >= 0):
        raise InvalidSetting(
            f"radius: got {radius_px!r}, but a number of pixels of at least 0 is needed. 0 keeps the edge as it is."
        )
    return float(radius_px)


def feather(mask: Tensor, radius_px: float) -> Tensor:
    """Blur the edge of ``mask`` ``[B, H, W]`` over ``radius_px`` pixels to both sides; it stays 1 or 0 further away.

    A Gaussian with sigma = radius / 3, cut at the radius. The image's border counts as continued: a mask that touches
    it is not faded there. Returns ``[B, H, W]`` in 0..1.

    Raises:
        InvalidImage: not a mask.
        InvalidSetting: a radius that is negative or not a number.
        MissingPackage: kornia is not installed.
    """
    mask = check_mask("mask", mask, allow_empty=True)
    radius = check_radius(radius_px)
    if radius == 0:
        return mask
    kornia = require("kornia.filters", "blur masks", "kornia")
    size = 2 * math.ceil(radius) + 1
    sigma = radius / 3
    blurred: Tensor = kornia.gaussian_blur2d(
        mask[:, None].float(), (size, size), (sigma, sigma), border_type="replicate"
    )
    return blurred[:, 0].clamp(0, 1).to(mask.dtype)


def feather_inward(mask: Tensor, radius_px: float) -> Tensor:
    """Fade ``mask`` ``[B, H, W]`` towards its own edge: never above the mask, and exactly 0 wherever the mask is 0.

    A pixel at distance d from the nearest unselected one gets at most 3t^2 - 2t^3 with t = d / (radius + 1), a
    smoothstep, so a part thinner than the radius fades but does not vanish. The image's border is no edge. Returns
    ``[B, H, W]`` in 0..1.

    Raises:
        InvalidImage: not a mask.
        InvalidSetting: a radius that is negative or not a number.
        MissingPackage: scipy is not installed.
    """
    mask = check_mask("mask", mask, allow_empty=True)
    return faded(mask, check_radius(radius_px))


def faded(mask: Tensor, radius: float) -> Tensor:
    """:func:`feather_inward` of what has been checked."""
    if radius == 0:
        return mask
    ndimage = require("scipy.ndimage", "measure the distance to a mask's edge", "scipy")
    result = []
    for one in mask:
        selected = (one > 0).cpu().numpy()
        if selected.all():  # no edge to fade towards; the transform has no distance to give
            result.append(one)
            continue
        distance = torch.from_numpy(ndimage.distance_transform_edt(selected)).to(one)
        t = (distance / (radius + 1)).clamp(0, 1)
        result.append(torch.minimum(one, t * t * (3 - 2 * t)))
    return torch.stack(result)
