"""What a drag made, and its report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.report import memory_lines
from ..points import DragPoints, Point
from .settings import DragSettings
from .task import DragTask, Trace

_MOST_SHOWN = 12  # points of which the report tells the distance


@dataclass(frozen=True)
class Dragged:
    """What dragging made.

    ``reference`` and ``edited`` ``[1, C, h, w]`` are at the first of ``sigmas`` ``[N + 1]``, the levels left to sample
    of ``steps``; ``path`` ``[K, P, 2]`` is where the points were found, as (row, column) on ``grid``; ``distances``
    ``[P]`` are those of the end to the targets, in cells of the grid; ``losses`` has one of every change. ``points``,
    ``mask`` ``[1, H, W]`` (None: everywhere) and ``settings`` are what was asked for; ``recompute`` says whether
    blocks were computed twice in the end.
    """

    reference: Tensor = field(repr=False)
    edited: Tensor = field(repr=False)
    sigmas: Tensor
    path: Tensor = field(repr=False)
    distances: Tensor
    grid: tuple[int, int]
    losses: list[float] = field(repr=False)
    evaluations: int
    backwards: int
    seconds: float
    recompute: bool
    steps: int
    points: DragPoints = field(repr=False)
    mask: Tensor | None = field(repr=False)
    settings: DragSettings

    @classmethod
    def at_end(cls, task: DragTask, trace: Trace, *, reference: Tensor, moved: Tensor, sigmas: Tensor) -> Dragged:
        """A drag that is over; the edit is ``reference + moved``, the same bits where nothing moved."""
        return cls(
            reference=reference,
            edited=reference + moved,
            sigmas=sigmas,
            path=torch.stack(trace.path),
            distances=(task.targets - trace.path[-1]).norm(dim=1),
            grid=task.grid,
            losses=trace.losses,
            evaluations=task.model.evaluations - trace.evaluations,
            backwards=trace.backwards,
            seconds=time.perf_counter() - trace.started,
            recompute=task.recompute,
            steps=task.source.steps or len(task.source.sigmas) - 1,
            points=task.points,
            mask=task.mask,
            settings=task.settings,
        )

    @property
    def changes(self) -> int:
        """How often the latent was changed."""
        return len(self.losses)

    @property
    def arrived(self) -> int:
        """How many points came nearer to their target than the stop radius."""
        return int((self.distances < self.settings.stop_radius).sum())

    def ways(self) -> list[list[Point]]:
        """For every point where it was found, from the handle on, as (x, y) in fractions of the image."""
        high, wide = self.grid
        places = self.path.movedim(1, 0).tolist()
        return [[(column / wide, row / high) for row, column in point] for point in places]

    def json(self) -> str:
        """:meth:`ways` as JSON, beside what was asked for."""
        entries = [
            {
                "handle": [round(v, 5) for v in pair.handle],
                "target": [round(v, 5) for v in pair.target],
                "path": [[round(x, 5), round(y, 5)] for x, y in way],
            }
            for pair, way in zip(self.points.pairs, self.ways(), strict=True)
        ]
        return json.dumps({"points": entries})

    def text(self, peak_megabytes: int | None = None) -> str:
        """How far every point came and what it cost, in lines of text."""
        pixel = self.points.size[1] / self.grid[1]
        pairs = self.points.pairs
        left = [f"{number}: {float(d) * pixel:.0f}" for number, d in enumerate(self.distances, 1)]
        steps = f"{len(self.sigmas) - 1} of {self.steps} steps left to sample"
        lines = [
            f"{self.settings.mode}, {self.changes} changes, {steps}",
            f"{self.arrived} of {len(pairs)} point(s) arrived",
            "pixels to the target  " + "  ".join(left[:_MOST_SHOWN]) + (" ..." if len(pairs) > _MOST_SHOWN else ""),
        ]
        outside = [str(number) for number, pair in enumerate(pairs, 1) if not self._may_change(pair.handle)]
        if outside:
            lines.append(f"outside the mask, where nothing may change: {', '.join(outside)}")
        lines.append(f"{self.evaluations} network evaluations, {self.backwards} backward passes, {self.seconds:.1f} s")
        return "\n".join([*lines, *memory_lines(peak_megabytes, self.recompute, self.settings.recompute)])

    def _may_change(self, place: Point) -> bool:
        if self.mask is None:
            return True
        row = min(int(place[1] * self.mask.shape[1]), self.mask.shape[1] - 1)
        column = min(int(place[0] * self.mask.shape[2]), self.mask.shape[2] - 1)
        return bool(self.mask[0, row, column] > 0)
