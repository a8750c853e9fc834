"""Pairs of a handle point and a target point on an image, and the strokes of a mask painted beside them.

Coordinates are normalised: (0, 0) is the upper left corner of the image, (1, 1) the lower right one, x before y.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from ..core.checks import describe
from ..core.errors import InvalidPoints

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
    """One stroke of a round brush: through ``points`` (x, y in 0..1), ``radius`` in fractions of the image's width.

    ``erase`` takes away what earlier strokes painted.
    """

    points: tuple[Point, ...]
    radius: float
    erase: bool = False


@dataclass(frozen=True)
class DragPoints:
    """Pairs of points, and the image ``picture`` ``[1, H, W, 3]`` that they lie on."""

    pairs: tuple[PointPair, ...]
    picture: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return int(self.picture.shape[1]), int(self.picture.shape[2])

    def on_grid(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Handles and targets ``[P, 2]`` as (row, column) on a grid of that size, rounded to whole numbers.

        The reference's rule: fraction of the image times size of the grid. A point on the lower or right border would
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
        InvalidPoints: not a text, not JSON, another form, numbers outside 0..1, more than :data:`MOST_POINTS` pairs.
    """
    if not isinstance(text, str):
        raise InvalidPoints(f"points: got {describe(text)}, but text is needed. It should look like {EXAMPLE}.")
    if not text.strip():
        return (), ()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidPoints(f"points: the text is not valid JSON: {error}. It should look like {EXAMPLE}.") from error
    if isinstance(value, list):
        value = {"points": value}
    if not isinstance(value, dict):
        raise InvalidPoints(f"points: the text should look like {EXAMPLE}, but it is {_shown(value)}.")
    entries, painted = value.get("points", []), value.get("strokes", [])
    if not isinstance(entries, list) or not isinstance(painted, list):
        raise InvalidPoints(f'points: "points" and "strokes" must be lists. It should look like {EXAMPLE}.')
    if len(entries) > MOST_POINTS:
        raise InvalidPoints(f"points: {len(entries)} pairs are too many; the limit is {MOST_POINTS}.")
    pairs = tuple(_pair(number, entry) for number, entry in enumerate(entries, 1))
    return pairs, tuple(_stroke(number, entry) for number, entry in enumerate(painted, 1))


def _pair(number: int, entry: object) -> PointPair:
    name = f"points: pair {number}"
    if isinstance(entry, dict):
        missing = [key for key in ("handle", "target") if key not in entry]
        if missing:
            raise InvalidPoints(f'{name} has no "{missing[0]}". It should look like one of {EXAMPLE}.')
        return PointPair(_point(f"{name}, handle", entry["handle"]), _point(f"{name}, target", entry["target"]))
    if isinstance(entry, list) and len(entry) == 4:
        entry = [entry[:2], entry[2:]]
    if isinstance(entry, list) and len(entry) == 2:
        return PointPair(_point(f"{name}, handle", entry[0]), _point(f"{name}, target", entry[1]))
    raise InvalidPoints(f"{name} is not a pair of points: {_shown(entry)}. It should look like one of {EXAMPLE}.")


def _point(name: str, value: object) -> Point:
    if not _two_numbers(value):
        raise InvalidPoints(f"{name}: two numbers [x, y] are needed, but it is {_shown(value)}.")
    x, y = value
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InvalidPoints(
            f"{name}: x and y must be between 0 and 1, but it is {_shown(value)}. They are fractions of the image's "
            "width and height: divide pixels by its size."
        )
    return float(x), float(y)


def _two_numbers(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) and v == v for v in value)


def _stroke(number: int, entry: object) -> Stroke:
    name = f"points: stroke {number}"
    example = '{"points": [[0.4, 0.5], [0.5, 0.5]], "radius": 0.05}'
    path = entry.get("points") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(path, list) or not path:
        raise InvalidPoints(f"{name} has no points. It should look like {example}.")
    radius = entry.get("radius")
    if not isinstance(radius, (int, float)) or isinstance(radius, bool) or not 0 < radius <= 1:
        raise InvalidPoints(
            f"{name}: the radius must be a fraction of the width, 0 to 1, but it is {_shown(radius)}. It should look "
            f"like {example}."
        )
    places = tuple(_point(f"{name}, point {i}", point) for i, point in enumerate(path, 1))
    return Stroke(places, float(radius), bool(entry.get("erase", False)))


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
