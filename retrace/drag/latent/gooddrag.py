"""GoodDrag (Zhang et al. 2024): dragging and denoising in turns, always towards the look of the untouched image.

At each of the first noise levels the latent is changed a few times and then denoised one step, so that what the changes
break is mended before it adds up. Every patch is compared with the *first* one, on the untouched path, and not with the
one of the change before; so features cannot drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.sampling import require_finite
from .motion import FeatureGrid, arrived, patch_sum, square, track
from .result import Dragged
from .settings import GoodDragOptions
from .task import Changes, DragTask, Look, Trace, WholeLook


def anchored_loss(
    first: FeatureGrid, now: FeatureGrid, start: Tensor, handles: Tensor, targets: Tensor, options: GoodDragOptions
) -> Tensor:
    """How much the patch one stride ahead of each handle differs from the first patch at its start.

    The mean over channels and pixels, times (2 r)^2, the authors' normalisation; points nearer to their target than the
    stop radius are left out. Pixels outside the image are left out and the others count for them.
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


def good_drag(task: DragTask, x: Tensor, options: GoodDragOptions) -> Dragged:
    """Drag ``x`` ``[1, C, h, w]`` from the first noise level on; the result is some steps further down.

    Raises:
        RetraceError: NaN from the model.
    """
    trace = Trace(task.model.evaluations)
    sigmas = task.source.sigmas
    x = x.to(task.model.device, torch.float32)
    levels = [float(s) for s in sigmas.tolist()]
    untouched = _Untouched(task, x, levels)
    turns = _Turns(task, trace, options)
    z, handles = task.unit(x, levels[0]), task.handles
    level = 0
    while level < options.levels and not turns.finished:
        z, handles = turns.at_level(z, handles, untouched.look(level), levels[level], levels[level + 1])
        z = task.whole_look(z, levels[level], levels[level + 1]).below
        level += 1
        if task.settings.hard_mask:
            z = torch.lerp(untouched.z[level], z, task.area)
        require_finite(z, level, options.levels, levels[level])
    if options.look_at_end and turns.done:
        look = task.look(z, levels[level], levels[level + 1])
        turns.found(look, task.templates(untouched.look(level).features), handles)
    reference = task.noisy(untouched.z[level], levels[level])
    moved = task.noisy(z - untouched.z[level], levels[level])
    return Dragged.at_end(task, trace, reference=reference, moved=moved, sigmas=sigmas[level:])


class _Untouched:
    """The image on its own way down: unit latents ``z`` of all levels so far, and a look at the newest."""

    def __init__(self, task: DragTask, x: Tensor, levels: list[float]) -> None:
        self.task, self.levels = task, levels
        self.z = [task.unit(x, levels[0])]
        self._newest: WholeLook | None = None

    def look(self, level: int) -> WholeLook:
        """The look at a level; they come in order, each when the last one is no longer needed."""
        if self._newest is None or len(self.z) == level + 1:
            self._newest = self.task.whole_look(self.z[level], self.levels[level], self.levels[level + 1])
            self.z.append(self._newest.below)
        return self._newest


class _Turns:
    """The changes of all levels; it remembers when to give up."""

    def __init__(self, task: DragTask, trace: Trace, options: GoodDragOptions) -> None:
        self.task, self.trace, self.options = task, trace, options
        self.done = 0
        self.still = 0
        self.finished = False

    def at_level(
        self, z: Tensor, handles: Tensor, first: WholeLook, sigma: float, sigma_next: float
    ) -> tuple[Tensor, Tensor]:
        """The latent and the handles after the changes at one noise level."""
        task, options = self.task, self.options
        templates = task.templates(first.features)
        changes = Changes(task, self.trace, z, options.learning_rate)
        with task.model.differentiable(recompute=task.recompute):
            for step in range(options.rounds * options.changes):
                look = task.look(changes.z, sigma, sigma_next)
                if step == 0:  # the denoising step has moved the image
                    handles = self.found(look, templates, handles)
                if bool(arrived(handles, task.targets, options.stop_radius).all()):
                    self.finished = True
                    break
                loss = anchored_loss(first.features, look.features, task.handles, handles, task.targets, options)
                self.done += changes.apply(loss + options.mask_weight * task.background(look, first.below))
                if (step + 1) % options.changes == 0:
                    before, handles = handles, self.found(look, templates, handles)
                    self.still = self.still + 1 if bool((handles == before).all()) else 0
                shown = look if isinstance(look, WholeLook) else first
                task.report(self.done, options.limit, handles, shown.denoised)
                if self.still == options.patience or self.done >= options.limit:
                    self.finished = True
                    break
        return changes.z.detach(), handles

    def found(self, look: Look, templates: Tensor, handles: Tensor) -> Tensor:
        """Where the points are in ``look``."""
        handles = track(look.features, templates, handles, self.options.search_radius)
        self.trace.path.append(handles)
        return handles
