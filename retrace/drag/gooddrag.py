"""GoodDrag (Zhang et al. 2024): dragging and denoising in turns, always towards the look of the untouched picture.

At each of the first noise levels the latent is changed a few times and then denoised one step, so that what the changes
break is mended before it adds up. Every patch is compared with the *first* one, on the untouched path, and not with the
one of the change before; so features cannot drift.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidSchedule
from ..sampling import require_finite
from .motion import FeatureGrid, arrived, patch_sum, square, track
from .optimise import Dragged
from .task import Changes, DragTask, Look, check_single


@dataclass(frozen=True)
class GoodDragOptions:
    """The defaults are those of the authors' interface. Radii and strides are in cells of the grid."""

    levels: int | None = None  # at how many noise levels it drags, counted from the first; None: see `levels_of`
    rounds: int = 10  # how often the points are found again at each of them
    changes: int = 3  # per round
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

    Raises:
        InvalidImage: a batch.
        InvalidSchedule: a single step.
        RetraceError: NaN from the model.
    """
    check_single(x)
    most = levels_of(len(sigmas) - 1, options)
    started, before = time.perf_counter(), task.model.evaluations
    x = x.to(task.model.device, torch.float32)
    levels = [float(s) for s in sigmas.tolist()]
    untouched = _Untouched(task, x, levels)
    z, handles = task.unit(x, levels[0]), task.handles
    total = most * options.rounds * options.changes
    turns = _Turns(task, options, total)
    level = 0
    while level < most and not turns.finished:
        z, handles = turns.at_level(z, handles, untouched.look(level), levels[level], levels[level + 1], level)
        z = _denoised_step(task, z, levels[level], levels[level + 1])
        level += 1
        require_finite(z, level, most, levels[level])
    return Dragged(
        reference=untouched.latent(level),
        edited=task.noisy(z, levels[level]),
        sigmas=sigmas[level:],
        path=torch.stack(task.path),
        distances=(task.targets - handles).norm(dim=1),
        grid=task.grid,
        losses=task.losses,
        changes=turns.done,
        evaluations=task.model.evaluations - before,
        backwards=task.backwards,
        seconds=time.perf_counter() - started,
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
    """The picture on its own way down, looked at once per level."""

    def __init__(self, task: DragTask, x: Tensor, levels: list[float]) -> None:
        self.task, self.levels = task, levels
        self.z = [task.unit(x, levels[0])]
        self.looks: list[Look] = []

    def look(self, level: int) -> Look:
        while len(self.looks) <= level:
            i = len(self.looks)
            look = self.task.look(self.z[i], self.levels[i], self.levels[i + 1], whole=True)
            assert look.below is not None
            self.looks.append(look)
            self.z.append(look.below)
        return self.looks[level]

    def latent(self, level: int) -> Tensor:
        return self.task.noisy(self.z[level], self.levels[level])


class _Turns:
    """The changes of all levels; it remembers when to give up."""

    def __init__(self, task: DragTask, options: GoodDragOptions, total: int) -> None:
        self.task, self.options, self.total = task, options, total
        self.done = 0
        self.still = 0
        self.finished = False

    def at_level(
        self, z: Tensor, handles: Tensor, first: Look, sigma: float, sigma_next: float, level: int
    ) -> tuple[Tensor, Tensor]:
        """The latent and the handles after the changes at one noise level."""
        task, options = self.task, self.options
        templates = task.templates(first.features)
        changes = Changes(task, z, options.learning_rate)
        preview = first.denoised
        with task.model.differentiable():
            for step in range(options.rounds * options.changes):
                look = task.look(changes.z, sigma, sigma_next)
                if step == 0:  # the denoising step has moved the picture, too
                    handles = track(look.features, templates, handles, options.search_radius)
                    task.note(handles)
                if self.still == options.patience or bool(arrived(handles, task.targets, options.stop_radius).all()):
                    self.finished = True
                    break
                loss = anchored_loss(first.features, look.features, task.handles, handles, task.targets, options)
                loss = loss + options.mask_weight * task.background(look, first.below)
                task.losses.append(float(loss.detach()))
                changes.apply(loss)
                self.done += 1
                if (step + 1) % options.changes == 0:
                    handles = self._track(look, templates, handles)
                self._report(look.denoised if look.denoised is not None else preview, handles, level, step)
        self.finished = self.finished or self.still == options.patience
        return changes.z.detach(), handles

    def _track(self, look: Look, templates: Tensor, handles: Tensor) -> Tensor:
        found = track(look.features, templates, handles, self.options.search_radius)
        self.still = self.still + 1 if bool((found == handles).all()) else 0
        self.task.note(found)
        return found

    def _report(self, denoised: Tensor | None, handles: Tensor, level: int, step: int) -> None:
        position = level * self.options.rounds * self.options.changes + step + 1
        if self.task.callback is not None:
            distances = ((self.task.targets - handles).norm(dim=1) / self.task.grid[1]).tolist()
            self.task.callback(position, self.total, distances)
        self.task.model.progress(position, self.total, None if denoised is None else denoised.detach())


def _denoised_step(task: DragTask, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
    below = task.look(z, sigma, sigma_next, whole=True).below
    assert below is not None
    return below
