"""Motion supervision and point tracking (DragGAN: Pan et al. 2023; DragDiffusion: Shi et al. 2024, eqs. 3 and 4).

Both look at the feature map of one image on a grid finer than the map itself. They need it at a few dozen places, so
it is resized only there; the result is that of ``interpolate(..., mode="bilinear")`` on the whole map.

Positions are (row, column) on the grid, handles and targets ``[P, 2]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FeatureGrid:
    """The feature map ``[C, h, w]`` of one image, seen on a grid of ``height`` by ``width``."""

    def __init__(self, features: Tensor, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._rows, self._columns = features.shape[1:]
        self._flat = features.flatten(1)

    def at(self, positions: Tensor) -> Tensor:
        """Features ``[..., C]`` at whole positions ``[..., 2]``; those outside count as on the border."""
        row = _resized(positions[..., 0], self.height, self._rows)
        column = _resized(positions[..., 1], self.width, self._columns)
        return self._mix(row, column, lambda r, c: self._flat[:, r * self._columns + c].movedim(0, -1))

    def between(self, positions: Tensor) -> Tensor:
        """Features ``[..., C]`` at any positions ``[..., 2]``, linear between the four whole ones around each."""
        low = positions.floor()
        share = positions - low
        row = (low[..., 0], low[..., 0] + 1, share[..., 0])
        column = (low[..., 1], low[..., 1] + 1, share[..., 1])
        return self._mix(row, column, lambda r, c: self.at(torch.stack((r, c), -1)))

    def inside(self, positions: Tensor) -> Tensor:
        """Whether positions ``[..., 2]`` lie on the grid."""
        row, column = positions.unbind(-1)
        return (row >= 0) & (row <= self.height - 1) & (column >= 0) & (column <= self.width - 1)

    @staticmethod
    def _mix(row: tuple[Tensor, ...], column: tuple[Tensor, ...], value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        r0, r1, down = row
        c0, c1, right = column
        down, right = down[..., None], right[..., None]
        upper = value(r0, c0) * (1 - right) + value(r0, c1) * right
        lower = value(r1, c0) * (1 - right) + value(r1, c1) * right
        return upper * (1 - down) + lower * down


def _resized(position: Tensor, grid: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells around whole positions of the grid, and the share of the second (align_corners=False)."""
    position = position.clamp(0, grid - 1)
    source = ((position + 0.5) * (cells / grid) - 0.5).clamp(min=0)
    low = source.floor().clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    return low.long(), high.long(), source - low


def square(radius: int, device: torch.device | None = None) -> Tensor:
    """The offsets ``[(2 radius + 1)^2, 2]`` of a square patch, row by row."""
    side = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32)
    return torch.cartesian_prod(side, side)


def motion_loss(
    grid: FeatureGrid, handles: Tensor, targets: Tensor, radius: int, stop_radius: float, *, step: float = 1.0
) -> Tensor:
    """How much the patch around each handle differs from where it should go, one step on towards its target (eq. 3).

    For every point at least ``stop_radius`` from its target: the mean over channels of ``|sg(F(q)) - F(q + d)|``, d
    being ``step`` in the direction of the target (never beyond it), summed over the patch of that ``radius``. No
    gradient flows to the first term. Pixels outside the image are left out and the others count for them, where the
    reference's patches lose their shape; steps beyond the border read the border.
    """
    away = targets - handles
    distance = away.norm(dim=1, keepdim=True)
    offsets = square(radius, handles.device)
    source = handles[:, None] + offsets
    direction = away / distance.clamp(min=1e-7) * distance.clamp(max=step)
    difference = (grid.at(source).detach() - grid.between(source + direction[:, None])).abs().mean(-1)
    return patch_sum(difference, grid.inside(source), distance[:, 0] >= stop_radius)


def patch_sum(difference: Tensor, inside: Tensor, active: Tensor) -> Tensor:
    """Sum of ``[P, N]`` over active points; in each the mean over pixels inside the image stands for all N."""
    pixels = difference.shape[1]
    mean = (difference * inside).sum(1) / inside.sum(1).clamp(min=1)
    return (mean * active).sum() * pixels


def track(grid: FeatureGrid, templates: Tensor, handles: Tensor, radius: int) -> Tensor:
    """Where each point is now ``[P, 2]``: the place around its handle that looks most like its template (eq. 4).

    ``templates`` ``[P, C]`` are the features at the first handles before anything moved. The smallest sum of absolute
    differences over channels wins, the first one in reading order among equals; the search stays on the image.
    """
    candidates = handles[:, None] + square(radius, handles.device)
    with torch.no_grad():  # point by point, because the features of all candidates of all points can be gigabytes
        pairs = zip(candidates, templates, strict=True)
        difference = torch.stack([(grid.at(places) - template).abs().sum(-1) for places, template in pairs])
    difference = difference.masked_fill(~grid.inside(candidates), torch.inf)
    order = torch.arange(difference.shape[1], device=handles.device).expand_as(difference)
    smallest = difference.amin(1, keepdim=True)
    first = torch.where(difference == smallest, order, difference.shape[1]).amin(1)
    # Only NaN equals nothing, not even its own minimum: such a point stays where it is.
    lost = first == difference.shape[1]
    found = candidates[torch.arange(len(handles), device=handles.device), first.clamp(max=difference.shape[1] - 1)]
    return torch.where(lost[:, None], handles, found)


def arrived(handles: Tensor, targets: Tensor, stop_radius: float) -> Tensor:
    """Which points ``[P]`` are nearer than ``stop_radius`` to their targets."""
    near: Tensor = (targets - handles).norm(dim=1) < stop_radius
    return near
