"""Images at another size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` in 0..1 to ``size`` (height, width): bicubic with antialiasing, what overshoots is clamped."""
    if tuple(images.shape[1:3]) == size:
        return images
    moved = F.interpolate(images.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
    return moved.clamp(0, 1).movedim(1, -1)
