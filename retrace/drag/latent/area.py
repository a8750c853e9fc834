"""Where a latent may change: a mask on its grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import latent_mask


def everything(height: int, width: int) -> Tensor:
    """All cells ``[1, 1, h, w]`` of a latent."""
    return torch.ones(1, 1, height, width)


def touched_cells(mask: Tensor, height: int, width: int) -> Tensor:
    """``mask`` ``[1, H, W]`` on the latent grid ``[1, 1, h, w]``: 1 in every cell that it touches."""
    return latent_mask(mask, mode="any", size=(height, width))[:, None].float()


def sampled_cells(mask: Tensor, height: int, width: int) -> Tensor:
    """The reference's rule: one pixel per cell decides, by way of a grid of half the image.

    A mask that gets lost in it is no mask at all there.
    """
    half = F.interpolate((mask > 0).float()[:, None], (mask.shape[1] // 2, mask.shape[2] // 2), mode="nearest")
    cells = F.interpolate(half, (height, width), mode="nearest")
    return cells if bool(cells.any()) else everything(height, width)


def alike(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether an image of that size has the proportions of a latent, give or take what a VAE crops."""
    high, wide = size
    return abs(height - width * high / wide) <= 1 or abs(width - height * wide / high) <= 1
