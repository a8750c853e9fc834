"""Sample an edit: a source and its targets side by side, from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..core.checks import check_latent
from ..core.errors import RetraceError
from ..core.host import Conditioning, Denoiser, guided
from ..core.sampling import ddim_step, require_finite
from ..core.schedule import check_sigmas
from ..core.trajectory import Trajectory
from .control import PromptToPrompt
from .proximal import Proximal


def sample_edit(
    model: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float = 7.5,
    *,
    edit: PromptToPrompt | None = None,
    source: Trajectory | None = None,
    null_text: Sequence[Tensor] | None = None,
    source_needs_no_guidance: bool = False,
    proximal: Proximal | None = None,
) -> Tensor:
    """Guided DDIM sampling of ``[source, target ...]`` from one ``noise`` ``[1, C, h, w]`` at ``sigmas[0]``.

    ``cond`` holds the embeddings of all P prompts, ``[P, T, D]``, the source first. Returns latents ``[P, C, h, w]``.

    Args:
        edit: Prompt-to-Prompt between the prompts; without it they share nothing but the noise.
        source: Direct Inversion (Ju et al. 2024): the source is put back on the path of its inversion at every step.
            Its guided estimate is then not needed, which leaves 2 P - 1 evaluations per step of 2 P.
        null_text: unconditional embeddings ``[1, T, D]`` for every step, from :mod:`retrace.inversion.null_text`.
        source_needs_no_guidance: ``uncond`` is the source prompt itself (negative-prompt inversion, Miyake et al.
            2023), so that guidance does nothing to the source; saves the same evaluation.
        proximal: threshold what guidance changes.

    Raises:
        InvalidSchedule, InvalidImage, TrajectoryMismatch: what cannot be sampled.
        RetraceError: as many embeddings as ``edit`` has prompts are needed; NaN.
    """
    levels = [float(s) for s in check_sigmas(sigmas).tolist()]
    prompts = len(cond.embedding)
    if edit is not None and edit.prompts != prompts:
        raise RetraceError(f"The edit has {edit.prompts} prompts, but the condition holds {prompts} embeddings.")
    x = check_latent("noise", noise).to(model.device)[:1].repeat(prompts, 1, 1, 1)
    if source is not None:
        x[:1] = source.at(levels[0]).to(x)
    total = len(levels) - 1
    controller = edit.start(total) if edit is not None else None
    alone = source is not None or source_needs_no_guidance
    with torch.no_grad():
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if sigma == sigma_next:
                continue
            if controller is None:
                with_text = model.denoised(x, sigma, cond)
            else:
                controller.step = i
                with model.attention(controller):
                    with_text = model.denoised(x, sigma, cond)
            negative = uncond if null_text is None else uncond.with_embedding(null_text[i].to(x.device))
            without = with_text.clone()  # where guidance does nothing
            without[int(alone) :] = model.denoised(x[int(alone) :], sigma, negative)
            if proximal is None:
                denoised = guided(without, with_text, scale)
            else:
                denoised = proximal.guided(without, with_text, scale)
            x = ddim_step(x, denoised, sigma, sigma_next).clone()
            if source is not None:
                x[:1] = source.at(sigma_next).to(x)
            if controller is not None and controller.maps is not None:
                x = controller.maps.blend_latents(x, i + 1, total)
            require_finite(x, i + 1, total, sigma)
            model.progress(i + 1, total, denoised)
    return x
