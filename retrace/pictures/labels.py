"""A line of text under each image of a batch, for previews."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .convert import INK, PAPER, to_tensor
from .fonts import drawable, font_for


def with_labels(images: Tensor, labels: Sequence[str]) -> Tensor:
    """``images`` ``[B, H, W, 3]`` in 0..1, each with its label on a dark strip below: ``[B, H + strip, W, 3]``."""
    height = max(16, images.shape[2] // 16)
    font = font_for("".join(labels), round(0.7 * height))
    strips = []
    for label in labels:
        strip = Image.new("RGB", (images.shape[2], height), INK)
        ImageDraw.Draw(strip).text((4, 0.1 * height), drawable(label, font), PAPER, font)
        strips.append(to_tensor(strip))
    return torch.cat([images.float().cpu(), torch.stack(strips)], dim=1)
