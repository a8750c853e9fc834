"""A deformation on the pixels of an image: where it leads, how far each pixel has come, and what lies there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks.regions import around
from .deformation import Deformation

_COARSEST = 8  # px between the places of a grid
_EVALUATIONS = 1 << 22  # places times points times steps on a grid
_REFINED = 1 << 24  # the same, where the grid is too coarse
_EXACT = 0.03  # px


def displacement(deformation: Deformation, top: int, left: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Displacement ``[2, h, w]`` (x, y) in pixels from the pixels of a window to where they were before.

    Worked out for a grid of pixels and linear in between, so that large images with many points take no longer; but
    for every pixel of a cell where that would be wrong by more than :data:`_EXACT`, the most bent ones first.
    """
    cost = deformation.places.size
    spacing = min(max(1, math.ceil(math.sqrt(size[0] * size[1] * cost / _EVALUATIONS))), _COARSEST)
    rows, columns = (-(-(side - 1) // spacing) + 1 for side in size)
    y = (torch.arange(rows, device=device) * spacing + top + 0.5)[:, None].expand(rows, columns)
    x = (torch.arange(columns, device=device) * spacing + left + 0.5)[None].expand(rows, columns)
    back = torch.stack([d.view(rows, columns) for d in deformation.origin(x.flatten(), y.flatten())])
    if spacing == 1:
        return back
    bend = _bend(back)
    full = ((rows - 1) * spacing + 1, (columns - 1) * spacing + 1)
    back = F.interpolate(back[None], size=full, mode="bilinear", align_corners=True)[0, :, : size[0], : size[1]]
    count = min(int((bend > _EXACT).sum()), _REFINED // (cost * spacing**2))
    if count:
        chosen = torch.zeros_like(bend, dtype=torch.bool).flatten()
        chosen[bend.flatten().topk(count).indices] = True
        cells = chosen.view(bend.shape).repeat_interleave(spacing, 0).repeat_interleave(spacing, 1)
        row, column = cells[: size[0], : size[1]].nonzero(as_tuple=True)
        back[:, row, column] = torch.stack(deformation.origin(column + left + 0.5, row + top + 0.5))
    return back


def _bend(grid: Tensor) -> Tensor:
    """How far the true middle of each cell may be from a linear guess, ``[rows, columns]``, by second differences.

    A cell goes by its upper left corner.
    """
    bend = torch.zeros_like(grid[0])
    for dim in (1, 2):
        if grid.shape[dim] > 2:
            second = grid.diff(n=2, dim=dim).norm(dim=0) / 8
            bend.narrow(dim - 1, 1, second.shape[dim - 1]).copy_(
                torch.maximum(bend.narrow(dim - 1, 1, second.shape[dim - 1]), second)
            )
    return F.max_pool2d(F.pad(bend, (0, 1, 0, 1))[None], 2, 1)[0]


def reached_window(deformation: Deformation, shape: Tensor) -> tuple[slice, slice] | None:
    """The window of the image that ``shape`` ``[H, W]`` may move into, found on a grid; None for nowhere."""
    height, width = shape.shape
    rows, columns = (-(-side // _COARSEST) + 1 for side in (height, width))
    y = (torch.arange(rows, device=shape.device) * float(_COARSEST))[:, None].expand(rows, columns)
    x = (torch.arange(columns, device=shape.device) * float(_COARSEST))[None].expand(rows, columns)
    dx, dy = deformation.origin(x.flatten(), y.flatten())
    origins = torch.stack([x + dx.view(rows, columns), y + dy.view(rows, columns)])[None]
    # What a cell shows lies in the box around the origins of its corners; one cell more, as it is not quite linear.
    highest, lowest = F.max_pool2d(origins, 2, 1)[0], -F.max_pool2d(-origins, 2, 1)[0]
    reached = torch.ones_like(highest[0], dtype=torch.bool)
    for axis, side in ((1, 0), (0, 1)):
        filled = around(shape, _COARSEST)[side]
        reached &= (highest[axis] >= filled.start) & (lowest[axis] <= filled.stop)
    if not bool(reached.any()):
        return None
    window = around(reached, 1)
    limits = ((w.start * _COARSEST, min(w.stop * _COARSEST, side)) for w, side in zip(window, shape.shape, strict=True))
    down, across = (slice(*limit) for limit in limits)
    return down, across


def sample(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``values`` ``[H, W, C]`` between its pixels, whose centres are at whole numbers and a half: ``[..., C]``.

    Bilinear; the border is continued. Exact at the centres, so that a shift by whole pixels copies.
    """
    height, width = values.shape[:2]
    x, y = (x - 0.5).clamp(0, width - 1), (y - 0.5).clamp(0, height - 1)
    column, row = x.floor(), y.floor()
    right, down = (x - column)[..., None].to(values), (y - row)[..., None].to(values)
    flat = values.reshape(height * width, -1)
    first, below = row.long() * width, (row.long() + 1).clamp(max=height - 1) * width
    here, beside = column.long(), (column.long() + 1).clamp(max=width - 1)
    upper = torch.lerp(flat[first + here], flat[first + beside], right)
    lower = torch.lerp(flat[below + here], flat[below + beside], right)
    return torch.lerp(upper, lower, down)
