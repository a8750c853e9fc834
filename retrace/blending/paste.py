"""Paste Background: the source's own pixels outside the mask, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_image, check_mask, check_same_size, match_batch
from ..masks.feather import check_radius, faded


def paste_background(edited: Tensor, source: Tensor, mask: Tensor, feather_px: float = 0) -> Tensor:
    """Keep ``edited`` inside ``mask`` and put ``source`` back everywhere else.

    Where the mask is 0 the result is the source, bit for bit, in float and therefore also in an 8-bit file; where it is
    1 (after feathering) it is the edited image; between, the two mix linearly. Feathering only goes inward, so it
    never touches a pixel outside the given mask.

    Args:
        edited: ``[B, H, W, 3]``, 0..1.
        source: ``[B, H, W, 3]`` or one ``[1, H, W, 3]`` for all, 0..1.
        mask: ``[B, H, W]`` or one ``[1, H, W]`` for all, 1 = edit. An empty mask gives the source.
        feather_px: width of the fade along the inner edge, in pixels.

    Returns:
        ``[B, H, W, 3]`` of the source's type and device.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit.
        InvalidSetting: a negative feather.
    """
    edited = check_image("edited image", edited)
    source = check_image("source image", source)
    check_same_size("edited image", edited, "the source image", source)
    mask = check_mask("mask", mask, size=(source.shape[1], source.shape[2]), allow_empty=True)
    batch = edited.shape[0]
    source = match_batch(source, batch, "source image")
    alpha = faded(match_batch(mask, batch, "mask"), check_radius(feather_px)).to(source)[..., None]
    edited = edited.to(source)
    # Selected, not multiplied: source + 0 * (edited - source) would already lose a bit of -0 or of rounding.
    mixed = torch.lerp(source, edited, alpha)
    return torch.where(alpha <= 0, source, torch.where(alpha >= 1, edited, mixed))
