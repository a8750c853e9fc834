"""The seam of a paste: how steep a picture is across the border of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from retrace.core.checks import check_image, check_mask, match_batch


def border_gradient(image: Tensor, mask: Tensor) -> Tensor:
    """Mean colour step across the border of ``mask``, per pixel, one value per image [B].

    It looks at all pairs of neighbours, in a row or in a column, of which exactly one belongs to the mask; a step is
    the Euclidean distance of their colours. Compare with the same border in the source: the ratio is 1 where nothing
    was edited, and above 1 where a seam shows.

    Args:
        image: [B,H,W,3], 0..1.
        mask: [B or 1,H,W]; every pixel above 0 belongs to it.

    Returns:
        [B] float64 on the CPU, in 0..sqrt(3); NaN where a mask has no border inside the picture.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit.
    """
    image = check_image("image", image)
    mask = check_mask("mask", mask, size=(image.shape[1], image.shape[2]), allow_empty=True)
    inside = match_batch(mask, image.shape[0], "mask").cpu() > 0
    pixels = image.cpu().double()
    total, pairs = torch.zeros(len(pixels), dtype=torch.float64), torch.zeros(len(pixels), dtype=torch.float64)
    for axis in (1, 2):
        steps = pixels.diff(dim=axis).norm(dim=-1)
        crossing = inside.narrow(axis, 1, inside.shape[axis] - 1) != inside.narrow(axis, 0, inside.shape[axis] - 1)
        total += (steps * crossing).sum(dim=(1, 2))
        pairs += crossing.sum(dim=(1, 2))
    return total / pairs
