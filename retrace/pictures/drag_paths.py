"""The ways of dragged points, drawn on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_image, check_mask
from ..core.errors import InvalidPoints
from ..drag.latent.result import Dragged
from ..drag.points import Point
from .fonts import font_for

if TYPE_CHECKING:
    from PIL import ImageDraw

HANDLE, TARGET, WAY = (225, 32, 40), (30, 90, 245), (255, 214, 10)
_RIM, _INK = (20, 20, 22), (255, 255, 255)
_DIM = 0.45
"""Brightness of what the mask does not let change."""
_FINE = 3  # drawn at this many times the size, and averaged
_LEAST, _MOST = 768, 4096  # pixels of the longer side that is drawn on: a small image would hide under its dots


def draw_drag(dragged: Dragged) -> Tensor:
    """The ways of a drag on the image that its points lie on; see :func:`draw_paths`.

    What the mask does not let change is dimmed, where the mask has the size of the image.
    """
    points, mask = dragged.points, dragged.mask
    shown = mask if mask is not None and tuple(mask.shape[1:]) == points.size else None
    return draw_paths(points.picture, dragged.ways(), [pair.target for pair in points.pairs], shown)


def draw_paths(
    picture: Tensor,
    paths: Sequence[Sequence[Point]],
    targets: Sequence[Point] = (),
    mask: Tensor | None = None,
) -> Tensor:
    """Draw where points started (red), where they should go (blue), and the way that they went (yellow, a ring at its
    end).

    Args:
        picture: ``[1, H, W, 3]`` in 0..1.
        paths: for each point the places (x, y) in 0..1 that it came by, the handle first.
        targets: where each should go, as many as there are paths, or none.
        mask: ``[1, H, W]`` in 0..1; the rest of the image is dimmed.

    Returns:
        ``[1, H', W', 3]``: the image's size, or a whole multiple of it where that is small.

    Raises:
        InvalidPoints: a path without a place, or another number of targets than of paths.
        InvalidImage: not an image, or a mask that does not fit.
    """
    from PIL import Image, ImageDraw

    picture = check_image("image", picture)[:1]
    if targets and len(targets) != len(paths):
        raise InvalidPoints(f"paths: got {len(paths)} paths and {len(targets)} targets, but one for each is needed.")
    if not all(len(path) for path in paths):
        raise InvalidPoints("paths: one of them has no place, but at least the handle is needed.")
    height, width = picture.shape[1:3]
    if mask is not None:
        area = check_mask("mask", mask, size=(height, width), allow_empty=True)[:1].to(picture)
        picture = picture * (_DIM + (1 - _DIM) * area[..., None])
    enlarge = max(1, round(_LEAST / 2 / max(height, width)))
    if enlarge > 1:
        picture = picture.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    fine = max(1, min(_FINE, _MOST // (enlarge * max(height, width))))
    size = (enlarge * width * fine, enlarge * height * fine)
    # Drawn on a canvas of its own with transparency, so that the image under it stays as sharp as it is.
    canvas = Image.new("RGBA", size)
    sheet = _Sheet(ImageDraw.Draw(canvas), *size, max(4 * fine, round(max(size) / 90)))
    for number, path in enumerate(paths):
        target = targets[number] if targets else None
        if target is not None:
            sheet.line([path[-1], target], TARGET, sheet.dot / 5)
        sheet.line(path, _RIM, sheet.dot / 1.6)
        sheet.line(path, WAY, sheet.dot / 2.6)
    for number, path in enumerate(paths):
        if targets:
            sheet.disc(targets[number], TARGET)
        sheet.disc(path[0], HANDLE)
        if len(path) > 1:
            sheet.ring(path[-1], WAY)
    for number, path in enumerate(paths):
        sheet.number(path[0], number + 1)
    small = canvas.resize((enlarge * width, enlarge * height), Image.Resampling.BOX)
    drawn = torch.from_numpy(np.asarray(small, np.float32) / 255).to(picture)[None]
    return torch.lerp(picture, drawn[..., :3], drawn[..., 3:])


@dataclass(frozen=True)
class _Sheet:
    """Draws at places in 0..1; ``dot`` is the radius of a point in pixels of the canvas."""

    draw: ImageDraw.ImageDraw
    width: int
    height: int
    dot: float

    def _at(self, place: Point) -> Point:
        return place[0] * self.width, place[1] * self.height

    def line(self, path: Sequence[Point], colour: tuple[int, int, int], width: float) -> None:
        for start, end in pairwise(map(self._at, path)):
            self.draw.line([start, end], (*colour, 255), max(1, round(width)))
        for x, y in map(self._at, path) if len(path) > 1 else ():  # round joints and ends
            self._round(x, y, width / 2, colour)

    def disc(self, place: Point, colour: tuple[int, int, int]) -> None:
        x, y = self._at(place)
        self._round(x, y, self.dot * 1.2, _RIM)
        self._round(x, y, self.dot, colour)

    def ring(self, place: Point, colour: tuple[int, int, int]) -> None:
        x, y = self._at(place)
        for radius, ink, width in ((1.1, _RIM, 0.9), (1.0, colour, 0.45)):
            reach = self.dot * (radius + (0.15 if ink == _RIM else 0))
            self.draw.ellipse(
                (x - reach, y - reach, x + reach, y + reach),
                outline=(*ink, 255),
                width=max(1, round(self.dot * width / 1.2)),
            )

    def number(self, place: Point, number: int) -> None:
        """The number beside a point, on the side where there is room."""
        text = str(number)
        font = font_for(text, round(self.dot * 2.6))
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font)
        x, y = self._at(place)
        across, up = right - left, bottom - top
        x += self.dot * 1.4 if x + self.dot * 1.8 + across < self.width else -self.dot * 1.4 - across
        y += -self.dot * 1.2 - up if y - self.dot * 1.6 - up > 0 else self.dot * 1.2
        self.draw.text(
            (x - left, y - top),
            text,
            (*_INK, 255),
            font,
            stroke_width=max(1, round(self.dot / 3)),
            stroke_fill=(*_RIM, 255),
        )

    def _round(self, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, 255))
