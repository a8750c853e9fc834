"""GoodDrag (Zhang et al. 2024): dragging and denoising in turns, always towards the look of the untouched picture.

At each of the first noise levels the latent is changed a few times and then denoised one step, so that what the changes
break is mended before it adds up. Every patch is compared with the *first* one, on the untouched path, and not with the
one of the change before; so features cannot drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InvalidSchedule
from ...core.sampling import require_finite
from .motion import FeatureGrid, arrived, patch_sum, square, track
from .optimise import Dragged
from .task import Changes, DragTask, Look, Trace, check_single


@dataclass(frozen=True)
class GoodDragOptions:
    """The defaults are those of the authors' interface. Radii and strides are in cells of the grid."""

    levels: int | None = None  # at how many noise levels it drags, counted from the first; None: see `levels_of`
    rounds: int = 10  # how often the points are found again at each of them
    changes: int = 3  # per round
    limit: int | None = None  # changes in all, at most
    learning_rate: float = 0.02
    patch_radius: int = 4
    search_radius: int = 12
    stride: float = 4.0
    stop_radius: float = 2.0
    mask_weight: float = 0.2
    patience: int = 10  # rounds in a row in which no point moves, after which it gives up
    parity: bool = False


def anchored_loss(
    first: FeatureGrid, now: FeatureGrid, start: Tensor, handles: Tensor, targets: Tensor, options: GoodDragOptions
) -> Tensor:
    """How much the patch one stride ahead of each handle differs from the first patch at its start.

    The mean over channels and pixels, times (2 r)^2, the authors' normalisation; points nearer to their target than the
    stop radius are left out. Pixels outside the picture are left out and the others count for them.
    """
    away = targets - handles
    distance = away.norm(dim=1, keepdim=True)
    ahead = handles + away / distance.clamp(min=1e-7) * distance.clamp(max=options.stride)
    offsets = square(options.patch_radius, handles.device)
    source, goal = start[:, None] + offsets, ahead[:, None] + offsets
    difference = (first.at(source).detach() - now.between(goal)).abs().mean(-1)
    inside = now.inside(source) & now.inside(goal)
    total = patch_sum(difference, inside, distance[:, 0] >= options.stop_radius)
    return total * ((2 * options.patch_radius) ** 2 / len(offsets))


def good_drag(task: DragTask, x: Tensor, sigmas: Tensor, options: GoodDragOptions) -> Dragged:
    """Drag ``x`` ``[1, C, h, w]`` at level ``sigmas[0]``; the result is some steps further down.

    ``parity`` ends there; otherwise one more look tells where the points are in the end.

    Raises:
        InvalidImage: a batch.
        InvalidSchedule: a single step.
        RetraceError: NaN from the model.
    """
    check_single(x)
    most = levels_of(len(sigmas) - 1, options)
    trace = Trace(task.model.evaluations)
    x = x.to(task.model.device, torch.float32)
    levels = [float(s) for s in sigmas.tolist()]
    untouched = _Untouched(task, x, levels)
    turns = _Turns(task, trace, options, options.limit or most * options.rounds * options.changes)
    z, handles = task.unit(x, levels[0]), task.handles
    level = 0
    while level < most and not turns.finished:
        z, handles = turns.at_level(z, handles, untouched.look(level), levels[level], levels[level + 1])
        z = _step_down(task, z, levels[level], levels[level + 1])
        level += 1
        if task.hard_mask:
            z = torch.lerp(untouched.z[level], z, task.mask)
        require_finite(z, level, most, levels[level])
    if not options.parity and turns.done:
        look = task.look(z, levels[level], levels[level + 1])
        handles = turns.found(look, task.templates(untouched.look(level).features), handles)
    reference = task.noisy(untouched.z[level], levels[level])
    return Dragged.at_end(
        task,
        trace,
        reference=reference,
        moved=task.noisy(z - untouched.z[level], levels[level]),
        sigmas=sigmas[level:],
        stop_radius=options.stop_radius,
    )


def levels_of(steps: int, options: GoodDragOptions) -> int:
    """At how many of ``steps`` noise levels it drags: the authors' 7 of 38, or as large a part of other numbers.

    Further down the picture can hardly be changed. At least one level, and a step is left undragged.

    Raises:
        InvalidSchedule: a single step.
    """
    if steps < 2:
        raise InvalidSchedule(
            f"GoodDrag: it drags and denoises in turns, but only {steps} step is left to sample. Raise steps or "
            "strength."
        )
    usual = 7 if options.parity else max(1, round(steps * 7 / 38))
    return min(options.levels or usual, steps - 1)


class _Untouched:
    """The picture on its own way down: unit latents ``z`` of all levels so far, and a look at the newest."""

    def __init__(self, task: DragTask, x: Tensor, levels: list[float]) -> None:
        self.task, self.levels = task, levels
        self.z = [task.unit(x, levels[0])]
        self._newest: Look | None = None

    def look(self, level: int) -> Look:
        """The look at a level; they come in order, each when the last one is no longer needed."""
        if self._newest is None or len(self.z) == level + 1:
            self._newest = self.task.look(self.z[level], self.levels[level], self.levels[level + 1], whole=True)
            assert self._newest.below is not None
            self.z.append(self._newest.below)
        return self._newest


class _Turns:
    """The changes of all levels; it remembers when to give up."""

    def __init__(self, task: DragTask, trace: Trace, options: GoodDragOptions, most: int) -> None:
        self.task, self.trace, self.options, self.most = task, trace, options, most
        self.done = 0
        self.still = 0
        self.finished = False

    def at_level(
        self, z: Tensor, handles: Tensor, first: Look, sigma: float, sigma_next: float
    ) -> tuple[Tensor, Tensor]:
        """The latent and the handles after the changes at one noise level."""
        task, options = self.task, self.options
        templates = task.templates(first.features)
        changes = Changes(task, self.trace, z, options.learning_rate)
        with task.model.differentiable(recompute=task.recompute):
            for step in range(options.rounds * options.changes):
                look = task.look(changes.z, sigma, sigma_next)
                if step == 0:  # the denoising step has moved the picture, too
                    handles = self.found(look, templates, handles)
                if bool(arrived(handles, task.targets, options.stop_radius).all()):
                    self.finished = True
                    break
                loss = anchored_loss(first.features, look.features, task.handles, handles, task.targets, options)
                self.done += changes.apply(loss + options.mask_weight * task.background(look, first.below))
                if (step + 1) % options.changes == 0:
                    before, handles = handles, self.found(look, templates, handles)
                    self.still = self.still + 1 if bool((handles == before).all()) else 0
                task.report(self.done, self.most, handles, first.denoised if look.denoised is None else look.denoised)
                if self.still == options.patience or self.done >= self.most:
                    self.finished = True
                    break
        return changes.z.detach(), handles

    def found(self, look: Look, templates: Tensor, handles: Tensor) -> Tensor:
        """Where the points are in ``look``."""
        handles = track(look.features, templates, handles, self.options.search_radius)
        self.trace.path.append(handles)
        return handles


def _step_down(task: DragTask, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
    below = task.look(z, sigma, sigma_next, whole=True).below
    assert below is not None
    return below
