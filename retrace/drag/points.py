"""Pairs of a handle point and a target point on a picture, and the strokes of a mask painted beside them.

Coordinates are normalised: (0, 0) is the upper left corner of the picture, (1, 1) the lower right one, x before y.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_mask, describe
from ..core.errors import InvalidImage, InvalidPoints

Point = tuple[float, float]
MOST_POINTS = 100

EXAMPLE = '{"points": [{"handle": [0.40, 0.50], "target": [0.60, 0.50]}]}'


@dataclass(frozen=True)
class PointPair:
    """Move what lies at ``handle`` to ``target``; both (x, y) in 0..1."""

    handle: Point
    target: Point


@dataclass(frozen=True)
class Stroke:
    """One stroke of a round brush: through ``points`` (x, y in 0..1), ``radius`` in shares of the picture's width.

    ``erase`` takes away what earlier strokes painted.
    """

    points: tuple[Point, ...]
    radius: float
    erase: bool = False


@dataclass(frozen=True)
class DragPoints:
    """What the socket RETRACE_POINTS carries: the pairs, and the picture ``[1, H, W, 3]`` that they lie on."""

    pairs: tuple[PointPair, ...]
    picture: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture in pixels."""
        return int(self.picture.shape[1]), int(self.picture.shape[2])

    def on_grid(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Handles and targets ``[P, 2]`` as (row, column) on a grid of that size, rounded to whole numbers.

        The reference's rule: share of the picture times size of the grid. A point on the lower or right border would
        lie one beyond the last cell, and counts as in it.
        """
        shares = torch.tensor([(*pair.handle, *pair.target) for pair in self.pairs], dtype=torch.float64)
        cells = (shares.reshape(-1, 2, 2).flip(-1) * torch.tensor([height, width])).round().float()
        handles, targets = cells.minimum(torch.tensor([height - 1.0, width - 1.0])).unbind(1)
        return handles, targets


def parse_points(text: str) -> tuple[tuple[PointPair, ...], tuple[Stroke, ...]]:
    """Pairs and strokes from JSON.

    ``{"points": [{"handle": [x, y], "target": [x, y]}, ...], "strokes": [{"points": [[x, y], ...], "radius": r,
    "erase": false}, ...]}``; ``strokes`` may be missing. A bare list of ``[[x, y], [x, y]]`` or ``[x, y, x, y]`` works
    as well. No text, or an empty object, is no points.

    Raises:
        InvalidPoints: no text, no JSON, another form, numbers outside 0..1, more than :data:`MOST_POINTS` pairs.
    """
    if not isinstance(text, str):
        raise InvalidPoints(f"points: got {describe(text)}, but a text is needed. It should look like {EXAMPLE}.")
    if not text.strip():
        return (), ()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidPoints(f"points: the text is no JSON ({error}). It should look like {EXAMPLE}.") from error
    if isinstance(value, list):
        value = {"points": value}
    if not isinstance(value, dict):
        raise InvalidPoints(f"points: got {_shown(value)}. It should look like {EXAMPLE}.")
    entries, painted = value.get("points", []), value.get("strokes", [])
    if not isinstance(entries, list) or not isinstance(painted, list):
        raise InvalidPoints(f"points: 'points' and 'strokes' must be lists. It should look like {EXAMPLE}.")
    if len(entries) > MOST_POINTS:
        raise InvalidPoints(f"points: got {len(entries)} pairs, but at most {MOST_POINTS} are possible. Take some out.")
    pairs = tuple(_pair(number, entry) for number, entry in enumerate(entries, 1))
    return pairs, tuple(_stroke(number, entry) for number, entry in enumerate(painted, 1))


def _pair(number: int, entry: Any) -> PointPair:
    name = f"points: pair {number}"
    if isinstance(entry, dict):
        missing = [key for key in ("handle", "target") if key not in entry]
        if missing:
            raise InvalidPoints(f"{name} has no '{missing[0]}'. Give both, as in {EXAMPLE}; in the node, drag from it.")
        return PointPair(_point(f"{name}, handle", entry["handle"]), _point(f"{name}, target", entry["target"]))
    if isinstance(entry, list) and len(entry) == 4:
        entry = [entry[:2], entry[2:]]
    if isinstance(entry, list) and len(entry) == 2:
        return PointPair(_point(f"{name}, handle", entry[0]), _point(f"{name}, target", entry[1]))
    raise InvalidPoints(f"{name} is {_shown(entry)}. It should look like one of {EXAMPLE}.")


def _point(name: str, value: Any) -> Point:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) and v == v for v in value)
    if not numbers:
        raise InvalidPoints(f"{name}: got {_shown(value)}, but two numbers [x, y] are needed.")
    if not all(0 <= v <= 1 for v in value):
        raise InvalidPoints(
            f"{name}: got {_shown(value)}, but both must lie in 0..1: shares of the picture's width and height. "
            "Divide pixels by the size of the picture."
        )
    return float(value[0]), float(value[1])


def _stroke(number: int, entry: Any) -> Stroke:
    name = f"points: stroke {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("points"), list) or not entry["points"]:
        raise InvalidPoints(f'{name}: it should look like {{"points": [[0.4, 0.5], [0.5, 0.5]], "radius": 0.05}}.')
    radius: Any = entry.get("radius")
    if type(radius) not in (int, float) or not 0 < radius <= 1:
        raise InvalidPoints(f"{name}: the radius is {_shown(radius)}, but a share of the width, 0 to 1, is needed.")
    path = tuple(_point(f"{name}, point {i}", point) for i, point in enumerate(entry["points"], 1))
    return Stroke(path, float(radius), bool(entry.get("erase", False)))


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


def movable_area(strokes: Sequence[Stroke], height: int, width: int, mask: Tensor | None = None) -> Tensor:
    """Where the picture may change, ``[1, H, W]`` in 0..1: ``mask`` with the strokes painted on it.

    A mask that is 0 everywhere, of any size, is none: Load Image gives that for a picture without transparency. Without
    a mask the strokes are the area; without strokes as well, or when they only erase, everything may move at first.

    Raises:
        InvalidImage: not one mask, or one of another size.
        InvalidPoints: everything was erased.
    """
    if mask is not None:
        if check_mask("mask", mask, allow_empty=True).amax() <= 0:
            mask = None
        elif mask.shape[0] != 1:
            raise InvalidImage(f"mask: got {describe(mask)}, but one mask for one picture is needed. Take one of them.")
        else:
            mask = check_mask("mask", mask, (height, width))
    if mask is None and all(stroke.erase for stroke in strokes):
        mask = torch.ones(1, height, width)
    area = paint_strokes(strokes, height, width, mask)
    if area.amax() <= 0:
        raise InvalidPoints(
            "mask: all of it was erased, so nothing may move. Paint the part that may move with the brush, or undo."
        )
    return area


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
