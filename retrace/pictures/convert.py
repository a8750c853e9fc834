"""Between tensors and Pillow's images, and the colours of everything that is drawn."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PAPER, INK, FAINT, LINE = (250, 250, 248), (24, 24, 26), (110, 110, 114), (205, 205, 203)


def to_tensor(picture: Image.Image) -> Tensor:
    """An 8-bit image of Pillow as ``[H, W, 3]`` in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255


def to_picture(image: Tensor) -> Image.Image:
    """``[H, W, 3]`` or ``[H, W]`` in 0..1 as an 8-bit image of Pillow."""
    return Image.fromarray((image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy())
