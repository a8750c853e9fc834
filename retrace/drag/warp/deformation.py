"""A smooth map of the plane that carries handle points to target points, read backwards: where did a place come from?

- ``stretch``: the displacements of the points, weighted by the inverse squared distance (Shepard 1968). What a point
  does not reach keeps its direction, so the region gives like rubber. Inpaint4Drag (Lu and Han 2025) warps like this.
- ``rigid``: at every place the rotation and shift that fits the points best, with the same weights (moving least
  squares, Schaefer et al. 2006, section 2.3). Two points and more turn what lies between them.
- ``scale``: the same with a change of size (section 2.2): points pulled apart enlarge.

All three are interpolations: a target comes from exactly its handle. One point is a shift in all of them.

A single such map folds over itself where neighbouring points part company by more than half their distance: a part of
the image then shows twice. So the motion is divided into as many small steps as it takes for none of them to fold
(each is a map from the points' places at one time to those a little earlier), and a composition of maps without folds
has none.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InvalidPoints, Remedy
from ..points import Point

Mode = Literal["rigid", "scale", "stretch"]
MODES: tuple[Mode, ...] = get_args(Mode)

TOGETHER = 0.5
"""Pixels: points nearer than this are one."""
MOST_STEPS = 16
_CAUTION = 4.0  # steps per (difference of two displacements / distance): a step then bends by half of what folds it
_TINY = 1e-12
_EQUAL = 1e-6  # px
_AT_ONCE = 1 << 20  # distances of places to points that are held in memory at once
_Places = NDArray[np.complex128]


class Deformation:
    """Carries ``handles`` to ``targets``, both ``(x, y)`` in pixels.

    Raises:
        InvalidPoints: one handle with two targets, two handles with one target, no points.
    """

    def __init__(self, handles: Sequence[Point], targets: Sequence[Point], mode: Mode, numbers: Sequence[int] = ()):
        if not handles:
            raise InvalidPoints("points: there are none.", Remedy.PLACE_POINTS)
        start = np.array([complex(*point) for point in handles])
        end = np.array([complex(*point) for point in targets])
        kept = _distinct(start, end, numbers or range(1, len(start) + 1))
        start, end = start[kept], end[kept]
        if float(abs((end - start) - (end - start)[0]).max()) < _EQUAL:  # one shift for all, without rounding
            start, end = start[:1], end[:1]
        self.mode: Mode = mode if len(start) > 1 else "stretch"
        self.places = _stages(start, end, self.mode)

    @property
    def steps(self) -> int:
        return len(self.places) - 1

    def origin(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Displacement ``(dx, dy)`` from places ``x, y`` ``[N]`` in pixels to where the same matter was before."""
        rows = max(1, _AT_ONCE // len(self.places[0]))
        found = [self._origin(*part) for part in zip(x.split(rows), y.split(rows), strict=True)]
        return torch.cat([dx for dx, _ in found]), torch.cat([dy for _, dy in found])

    def _origin(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for after, before in zip(self.places[:0:-1], self.places[-2::-1], strict=True):
            step_x, step_y = _step(x + dx, y + dy, after, before, self.mode)
            dx, dy = dx + step_x, dy + step_y
        return dx, dy


def _step(x: Tensor, y: Tensor, after: _Places, before: _Places, mode: Mode) -> tuple[Tensor, Tensor]:
    """Displacement of ``x, y`` ``[N]`` under the map that carries ``after`` to ``before``, both [P] complex."""
    px, py = (torch.as_tensor(part, dtype=x.dtype, device=x.device) for part in (after.real, after.imag))
    shift = before - after
    moved = np.stack([np.ones_like(shift.real), shift.real, shift.imag], 1)
    moved_by = torch.as_tensor(moved, dtype=x.dtype, device=x.device)  # [P, 3]
    to_x, to_y = px - x[:, None], py - y[:, None]
    distance = (to_x.square() + to_y.square()).clamp_(min=_TINY)
    nearest = distance.amin(1, keepdim=True)
    weight = nearest / distance  # 1 at the nearest point: only ratios count, and none overflows
    total, shift_x, shift_y = (weight @ moved_by).unbind(1)
    shift_x, shift_y = shift_x / total, shift_y / total
    if mode == "stretch":
        return shift_x, shift_y
    # Relative to the place itself, p are the points before the step and q = p + shift after it; p* and q* are their
    # weighted means. As complex numbers the best rotation is r / |r| with r = sum w (q - q*) conj(p - p*)
    # = sum w q conj(p) - q* conj(p*), with the weights divided by their sum.
    mean_x, along_xx, along_xy = ((weight * to_x) @ moved_by / total[:, None]).unbind(1)
    mean_y, along_yx, along_yy = ((weight * to_y) @ moved_by / total[:, None]).unbind(1)
    square = len(shift) * nearest[:, 0] / total - mean_x.square() - mean_y.square()  # sum w |p - p*|^2
    real = square + along_xx + along_yy - shift_x * mean_x - shift_y * mean_y
    imaginary = along_xy - along_yx - shift_y * mean_x + shift_x * mean_y
    size = torch.hypot(real, imaginary) if mode == "rigid" else square
    real, imaginary = real / size.clamp(min=_TINY), imaginary / size.clamp(min=_TINY)
    # The place, which is 0 here, goes to q* - (r / |r|) p*.
    turned_x, turned_y = real * mean_x - imaginary * mean_y, imaginary * mean_x + real * mean_y
    return mean_x + shift_x - turned_x, mean_y + shift_y - turned_y


def _distinct(start: _Places, end: _Places, numbers: Sequence[int]) -> list[int]:
    """The points without repetitions; raises InvalidPoints where two of them contradict each other."""
    kept: list[int] = []
    for i in range(len(start)):
        near = [j for j in kept if min(abs(start[i] - start[j]), abs(end[i] - end[j])) < TOGETHER]
        for j in near:
            if abs(start[i] - start[j]) >= TOGETHER:
                raise InvalidPoints(
                    f"points: {numbers[j]} and {numbers[i]} have one target at {_pixels(end[i])} px, but two handles: "
                    "two parts of an image cannot land in one place. Move one of the targets, or delete one "
                    "of the points."
                )
            if abs(end[i] - end[j]) >= TOGETHER:
                raise InvalidPoints(
                    f"points: {numbers[j]} and {numbers[i]} have one handle at {_pixels(start[i])} px, but two "
                    "targets: one part of an image cannot go to two places. Delete one of them, or move its handle."
                )
        if not near:
            kept.append(i)
    return kept


def _pixels(place: complex) -> str:
    return f"({place.real:.1f}, {place.imag:.1f})"


def _stages(start: _Places, end: _Places, mode: Mode) -> _Places:
    """Where the points are at the beginning, after every step, and at the end, ``[steps + 1, P]``.

    They follow the motion of all points together, a rotation and for ``scale`` a change of size, and along with it
    straight lines; for ``stretch`` the lines alone. So what is exactly that common motion takes a single step.
    """
    a, b = start - start.mean(), end - end.mean()
    together = complex(np.sum(b * a.conj())) if mode != "stretch" else 0j
    together = together / (float(np.sum(abs(a) ** 2)) if mode == "scale" else abs(together)) if together else 1 + 0j
    b = b / together
    steps = _steps(a, b)
    time = np.linspace(0, 1, steps + 1)[:, None]
    turn = np.array([cmath.exp(t * cmath.log(together)) for t in time[:, 0]])[:, None]
    stages: _Places = (1 - time) * start.mean() + time * end.mean() + turn * ((1 - time) * a + time * b)
    stages[0], stages[-1] = start, end  # without rounding
    return stages


def _steps(a: _Places, b: _Places) -> int:
    """How many steps it takes from ``a`` to ``b`` until neighbours change their distance little in each."""
    apart = np.minimum(abs(a[:, None] - a), abs(b[:, None] - b))
    change = abs((b - a)[:, None] - (b - a))
    ratio = float((change / np.maximum(apart, TOGETHER)).max())
    return min(max(math.ceil(_CAUTION * ratio), 1), MOST_STEPS)
