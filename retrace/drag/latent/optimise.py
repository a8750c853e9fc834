"""DragDiffusion's latent optimisation (Shi et al. 2024, section 3.3): change a noisy latent until the points arrived.

One evaluation, one backward pass and one step of Adam per change. The network sees the latent at one noise level, where
its features know what lies where and the picture can still be changed: the 35th of 50 steps in the paper.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.sampling import require_finite
from .motion import arrived, motion_loss, track
from .task import Changes, DragTask, Trace, check_single


@dataclass(frozen=True)
class DragOptions:
    """Of both modes; the defaults are those of DragDiffusion's code. Radii are in cells of the grid."""

    changes: int = 80  # at most
    learning_rate: float = 0.01
    patch_radius: int = 1
    search_radius: int = 3
    stop_radius: float = 2.0
    mask_weight: float = 0.1
    parity: bool = False


@dataclass(frozen=True)
class Dragged:
    """What dragging made.

    ``reference`` and ``edited`` ``[1, C, h, w]`` are at the first of ``sigmas`` ``[N + 1]``, the levels left to sample;
    ``path`` ``[K, P, 2]`` is where the points were found, as (row, column) on ``grid``; ``distances`` ``[P]`` are those
    of the end to the targets, in cells of the grid.
    """

    reference: Tensor
    edited: Tensor
    sigmas: Tensor
    path: Tensor
    distances: Tensor
    grid: tuple[int, int]
    losses: list[float]
    changes: int
    evaluations: int
    backwards: int
    seconds: float
    stop_radius: float
    recompute: bool

    @classmethod
    def at_end(
        cls, task: DragTask, trace: Trace, *, reference: Tensor, moved: Tensor, sigmas: Tensor, stop_radius: float
    ) -> Dragged:
        """A drag that is over; the edit is ``reference + moved``, the same bits where nothing moved."""
        return cls(
            reference=reference,
            edited=reference + moved,
            sigmas=sigmas,
            path=torch.stack(trace.path),
            distances=(task.targets - trace.path[-1]).norm(dim=1),
            grid=task.grid,
            losses=trace.losses,
            changes=len(trace.losses),
            evaluations=task.model.evaluations - trace.evaluations,
            backwards=trace.backwards,
            seconds=time.perf_counter() - trace.started,
            stop_radius=stop_radius,
            recompute=task.recompute,
        )

    @property
    def arrived(self) -> int:
        """How many points came nearer to their target than the stop radius."""
        return int((self.distances < self.stop_radius).sum())


def drag(task: DragTask, x: Tensor, sigmas: Tensor, options: DragOptions) -> Dragged:
    """Drag ``x`` ``[1, C, h, w]`` at level ``sigmas[0]``, the noisy latent of an inverted or a generated picture.

    The order is the reference's: look, find the points again (not before the first change), stop if all are there,
    supervise, change. ``parity`` ends after the last change; otherwise one more look tells where it led.

    Raises:
        InvalidImage: a batch.
        RetraceError: NaN from the model.
    """
    check_single(x)
    trace = Trace(task.model.evaluations)
    sigma, sigma_next = float(sigmas[0]), float(sigmas[1])
    x = x.to(task.model.device, torch.float32)
    changes = Changes(task, trace, task.unit(x, sigma), options.learning_rate)
    handles, templates, anchor = task.handles, None, None
    done = 0
    preview = None
    if task.cut:  # no look gives a clean estimate, so the first one is moved along for the preview
        preview = task.look(changes.held, sigma, sigma_next, whole=True).denoised
    with task.model.differentiable(recompute=task.recompute):
        while done < options.changes:
            look = task.look(changes.z, sigma, sigma_next)
            if templates is None:
                templates = task.templates(look.features)
                anchor = None if look.below is None else look.below.detach()
            else:
                handles = track(look.features, templates, handles, options.search_radius)
            trace.path.append(handles)
            if bool(arrived(handles, task.targets, options.stop_radius).all()):
                break
            loss = motion_loss(look.features, handles, task.targets, options.patch_radius, options.stop_radius)
            done += changes.apply(loss + options.mask_weight * task.background(look, anchor))
            shown = look.denoised
            if preview is not None:
                shown = preview + task.noisy(changes.z.detach() - changes.held, sigma)
            task.report(done, options.changes, handles, shown)
    z = changes.z.detach()
    require_finite(z, done, options.changes, sigma)
    if not options.parity and done == options.changes and templates is not None:
        last = task.look(z, sigma, sigma_next)
        handles = track(last.features, templates, handles, options.search_radius)
        trace.path.append(handles)
    moved = task.noisy(z - changes.held, sigma)
    return Dragged.at_end(task, trace, reference=x, moved=moved, sigmas=sigmas, stop_radius=options.stop_radius)
