"""Where an image may change: a mask, and brush strokes on top of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_mask, describe
from ..core.errors import InvalidImage, InvalidPoints
from .points import Stroke


def single_mask(mask: object, size: tuple[int, int] | None = None) -> Tensor | None:
    """The one mask ``[1, H, W]`` of where an image may change, or None where all of it may.

    A mask that is 0 everywhere, of any size, counts as none: that is what an image without transparency comes with.

    Args:
        mask: what arrived; None is none.
        size: the (height, width) that it must have unless it is empty.

    Raises:
        InvalidImage: not a mask, several masks, another size.
    """
    if mask is None:
        return None
    checked = check_mask("mask", mask, allow_empty=True)
    if not bool(checked.any()):
        return None
    if len(checked) != 1:
        raise InvalidImage(f"mask: got {describe(checked)}, but one mask for one image is needed. Take one of them.")
    if size is not None and checked.shape[1:] != size:
        check_mask("mask", checked, size)  # raises, and says how to resize it
    return checked


def movable_area(strokes: Sequence[Stroke], height: int, width: int, mask: object = None) -> Tensor:
    """Where the image may change, ``[1, H, W]`` in 0..1: ``mask`` with the strokes painted on it.

    Without a mask (see :func:`single_mask`) the strokes are the area. Without strokes as well, or when they only erase,
    everything may change at first.

    Raises:
        InvalidImage: not one mask, or one of another size.
        InvalidPoints: everything was erased.
    """
    below = single_mask(mask, (height, width))
    if below is None and all(stroke.erase for stroke in strokes):
        below = torch.ones(1, height, width)
    area = paint_strokes(strokes, height, width, below)
    if area.amax() <= 0:
        raise InvalidPoints(
            "mask: all of it was erased, so nothing may change. Paint the part that may change with the brush, or undo."
        )
    return area


def paint_strokes(strokes: Sequence[Stroke], height: int, width: int, below: Tensor | None = None) -> Tensor:
    """Strokes as a mask ``[1, H, W]``, 1 where painted, on top of the mask ``below`` of that size (0 without one).

    The border of a stroke is smooth: it is painted finer (4 times, at most 32 million cells) and averaged. Where no
    stroke touches it, ``below`` stays as it is, bit for bit.
    """
    from PIL import Image, ImageDraw

    mask = torch.zeros(1, height, width) if below is None else below.float().cpu()
    if not strokes:
        return mask
    fine = max(1, min(4, math.isqrt(32_000_000 // (height * width))))
    layers = [Image.new("L", (width * fine, height * fine)) for _ in ("painted", "touched")]
    pens = [ImageDraw.Draw(layer) for layer in layers]
    for stroke in strokes:
        radius = max(stroke.radius * width, 0.5) * fine
        path = [(x * width * fine, y * height * fine) for x, y in stroke.points]
        for pen, colour in zip(pens, (0 if stroke.erase else 255, 255), strict=True):
            for x, y in path:
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            if len(path) > 1:
                pen.line(path, fill=colour, width=max(1, round(2 * radius)))
    small = [layer.resize((width, height), Image.Resampling.BOX) for layer in layers]
    painted, touched = (torch.from_numpy(np.asarray(layer, np.float32) / 255) for layer in small)
    return (mask * (1 - touched) + painted).clamp(0, 1)
