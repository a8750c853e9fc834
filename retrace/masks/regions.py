"""Parts of a mask, and what lies near a set of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import require


def connected_parts(selected: Tensor) -> tuple[NDArray[np.int32], int]:
    """Number of the 8-connected part that each pixel of ``selected`` ``[H, W]`` (bool) belongs to, from 1; 0 outside.

    Raises:
        MissingPackage: scipy is not installed.
    """
    ndimage = require("scipy.ndimage", "find the separate parts of a mask", "scipy")
    labels, count = ndimage.label(selected.cpu().numpy(), structure=[[1, 1, 1]] * 3)
    return labels, int(count)


def part_of_each(labels: NDArray[np.int32], places: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """For every place (x, y) in pixels the part that it lies on, or the nearest one, and how far away that is."""
    height, width = labels.shape
    rows, columns = np.nonzero(labels)
    found = []
    for x, y in places:
        own = int(labels[min(int(y), height - 1), min(int(x), width - 1)])
        if own:
            found.append((own, 0.0))
            continue
        distance = np.hypot(columns + 0.5 - x, rows + 0.5 - y)
        nearest = int(distance.argmin())
        found.append((int(labels[rows[nearest], columns[nearest]]), float(distance[nearest])))
    return found


def distance_to(selected: Tensor, reach: float) -> Tensor:
    """Distance in pixels from each pixel to the nearest of ``selected`` ``[H, W]`` (bool); infinite beyond ``reach``.

    Raises:
        MissingPackage: scipy is not installed.
    """
    distance = torch.full(selected.shape, math.inf, device=selected.device)
    if not bool(selected.any()):
        return distance
    ndimage = require("scipy.ndimage", "measure distances in a mask", "scipy")
    box = around(selected, math.floor(reach))
    true = torch.from_numpy(ndimage.distance_transform_edt(~selected[box].cpu().numpy()))
    distance[box] = torch.where(true <= reach, true.float(), math.inf).to(distance.device)
    return distance


def around(selected: Tensor, margin: int) -> tuple[slice, slice]:
    """The window of all that is ``selected`` ``[H, W]`` (bool, not empty), with ``margin`` pixels around it."""
    first, last = [], []
    for dim in (1, 0):
        inside = selected.any(dim).nonzero()
        first.append(max(int(inside[0]) - margin, 0))
        last.append(int(inside[-1]) + margin + 1)
    return slice(first[0], last[0]), slice(first[1], last[1])


def within(selected: Tensor, reach: float) -> Tensor:
    """Pixels at most ``reach`` from one of ``selected`` ``[H, W]`` (bool)."""
    return selected if reach < 1 else distance_to(selected, reach).isfinite()
