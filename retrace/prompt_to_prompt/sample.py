"""Sample an edit: a source and its targets side by side, from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.checks import check_latent
from ..core.errors import RetraceError
from ..core.host import AttentionDenoiser, Conditioning, guided
from ..core.sampling import Callback, SampleStep, ddim_step, require_finite
from ..core.schedule import check_sigmas
from ..core.trajectory import Trajectory
from .control import PromptToPrompt
from .proximal import Proximal


@dataclass(frozen=True)
class EditSampling:
    """What an edit does beside guided sampling; each part may be left out.

    Attributes:
        edit: Prompt-to-Prompt between the prompts; without it they share nothing but the noise.
        source: Direct Inversion (Ju et al. 2024): the source is put back on the path of its inversion at every step.
            Its guided estimate is then not needed, which leaves 2 P - 1 evaluations per step of 2 P.
        null_text: unconditional embeddings ``[1, T, D]`` for every step, from :mod:`retrace.inversion.null_text`.
        source_needs_no_guidance: the unconditional words are the source prompt itself (negative-prompt inversion,
            Miyake et al. 2023), so that guidance does nothing to the source; saves the same evaluation.
        proximal: threshold what guidance changes.
        callback: called after every step.
    """

    edit: PromptToPrompt | None = None
    source: Trajectory | None = None
    null_text: Sequence[Tensor] | None = None
    source_needs_no_guidance: bool = False
    proximal: Proximal | None = None
    callback: Callback | None = None


def sample_edit(
    model: AttentionDenoiser,
    noise: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float = 7.5,
    options: EditSampling | None = None,
) -> Tensor:
    """Guided DDIM sampling of ``[source, target ...]`` from one ``noise`` ``[1, C, h, w]`` at ``sigmas[0]``.

    ``cond`` holds the embeddings of all P prompts, ``[P, T, D]``, the source first. Returns latents ``[P, C, h, w]``.
    A closing step between equal levels moves nothing; a local blend still reads its attention, as in the reference.

    Raises:
        InvalidSchedule, InvalidImage, TrajectoryMismatch: what cannot be sampled.
        RetraceError: as many embeddings as the edit has prompts are needed; NaN.
    """
    options = options or EditSampling()
    levels = [float(s) for s in check_sigmas(sigmas).tolist()]
    prompts, total = len(cond.embedding), len(levels) - 1
    if options.edit is not None and options.edit.prompts != prompts:
        raise RetraceError(f"The edit has {options.edit.prompts} prompts, but the condition holds {prompts}.")
    x = check_latent("noise", noise).to(model.device)[:1].repeat(prompts, 1, 1, 1)
    if options.source is not None:
        x[:1] = options.source.at(levels[0]).to(x)
    controller = None if options.edit is None else options.edit.start(total)
    alone = int(options.source is not None or options.source_needs_no_guidance)  # whether the source is not guided
    with torch.no_grad():
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if sigma == sigma_next and (controller is None or controller.maps is None):
                continue
            if controller is not None:
                controller.enter(i)
            with nullcontext() if controller is None else model.attention(controller):
                with_text = model.denoised(x, sigma, cond)
            denoised = with_text
            if sigma != sigma_next:
                negative = (
                    uncond if options.null_text is None else uncond.with_embedding(options.null_text[i].to(x.device))
                )
                without = with_text.clone()  # where guidance does nothing
                without[alone:] = model.denoised(x[alone:], sigma, negative)
                rule = guided if options.proximal is None else options.proximal.guided
                denoised = rule(without, with_text, scale)
                x = ddim_step(x, denoised, sigma, sigma_next).clone()
            if options.source is not None:
                x[:1] = options.source.at(sigma_next).to(x)
            if controller is not None:
                x = controller.blend(x, i + 1)
            if options.callback is not None:
                replaced = options.callback(SampleStep(i + 1, total, sigma, sigma_next, x, denoised))
                x = x if replaced is None else replaced
            require_finite(x, i + 1, total, sigma)
            model.progress(i + 1, total, denoised)
    return x
