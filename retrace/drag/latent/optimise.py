"""DragDiffusion's latent optimisation (Shi et al. 2024, section 3.3): change a noisy latent until the points arrived.

One evaluation, one backward pass and one step of Adam per change. The network sees the latent at one noise level, where
its features know what lies where and the image can still be changed: the 35th of 50 steps in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.sampling import require_finite
from .motion import arrived, motion_loss, track
from .result import Dragged
from .settings import DragOptions
from .task import Changes, DragTask, Trace, WholeLook


def drag(task: DragTask, x: Tensor, options: DragOptions) -> Dragged:
    """Drag ``x`` ``[1, C, h, w]`` at the first noise level, the noisy latent of an inverted or a generated image.

    The order is the reference's: look, find the points again (not before the first change), stop if all are there,
    supervise, change.

    Raises:
        RetraceError: NaN from the model.
    """
    trace = Trace(task.model.evaluations)
    sigmas = task.source.sigmas
    sigma, sigma_next = float(sigmas[0]), float(sigmas[1])
    x = x.to(task.model.device, torch.float32)
    changes = Changes(task, trace, task.unit(x, sigma), options.learning_rate)
    handles, templates, anchor = task.handles, None, None
    done = 0
    preview = None
    if task.cut:  # no look gives a clean estimate, so the first one is moved along for the preview
        preview = task.whole_look(changes.held, sigma, sigma_next).denoised
    with task.model.differentiable(recompute=task.recompute):
        while done < options.changes:
            look = task.look(changes.z, sigma, sigma_next)
            if templates is None:
                templates = task.templates(look.features)
                anchor = look.below.detach() if isinstance(look, WholeLook) else None
            else:
                handles = track(look.features, templates, handles, options.search_radius)
            trace.path.append(handles)
            if bool(arrived(handles, task.targets, options.stop_radius).all()):
                break
            loss = motion_loss(look.features, handles, task.targets, options.patch_radius, options.stop_radius)
            done += changes.apply(loss + options.mask_weight * task.background(look, anchor))
            shown = look.denoised if isinstance(look, WholeLook) else None
            if preview is not None:
                shown = preview + task.noisy(changes.z.detach() - changes.held, sigma)
            task.report(done, options.changes, handles, shown)
    z = changes.z.detach()
    require_finite(z, done, options.changes, sigma)
    if options.look_at_end and done == options.changes and templates is not None:
        last = task.look(z, sigma, sigma_next)
        trace.path.append(track(last.features, templates, handles, options.search_radius))
    return Dragged.at_end(task, trace, reference=x, moved=task.noisy(z - changes.held, sigma), sigmas=sigmas)
