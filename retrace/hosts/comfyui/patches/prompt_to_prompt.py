"""Prompt-to-Prompt under core's samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.schedule import step_of
from ....prompt_to_prompt import BlendWords, Controller, PlanSettings, PromptToPrompt, local_blend, plan
from ..calls import EvaluationCall, SamplerCall
from ..network.attention import install_attention
from ..network.unet import attention_layers
from ..prompts import MARK, TokenisedPrompts
from ..types import Clip, ConditioningList, Executor, Model
from .run_patch import RunPatch


@dataclass(frozen=True)
class PreparedEdit:
    """A patched MODEL, the CONDITIONING of all prompts (the source first), and what is done with their attention."""

    model: Model
    positive: ConditioningList
    edit: PromptToPrompt


def edit_by_words(
    model: Model, clip: Clip, texts: Sequence[str], settings: PlanSettings, blend: BlendWords
) -> PreparedEdit:
    """Everything that a sampler needs for an edit of ``texts[0]`` into the other ``texts``.

    Raises:
        UnsupportedModel: no UNet, or a text encoder that is not CLIP's.
        RetraceError: words that are in no prompt, see :func:`.plan` and :func:`.local_blend`.
    """
    tokenised = TokenisedPrompts(clip, texts)
    prompts = tokenised.read()
    edit = plan(prompts[0], prompts[1:], settings, local_blend(prompts, blend))
    return PreparedEdit(patch_prompt_to_prompt(model, edit), tokenised.encode(), edit)


def patch_prompt_to_prompt(model: Model, edit: PromptToPrompt) -> Model:
    """A clone of the MODEL whose samplers denoise the batch ``[source, target ...]`` with the attention of ``edit``.

    All images start from the noise of the first. Raises :class:`UnsupportedModel` without a UNet.
    """
    attention_layers(model.model.diffusion_model)
    patched = model.clone()
    _PromptToPromptPatch(edit).install(patched)
    return patched


class _PromptToPromptRun:
    """One run: tells the controller which step and which conditions run, and blends between steps."""

    def __init__(self, controller: Controller, sigmas: Tensor) -> None:
        self.controller = controller
        self.sigmas = sigmas.detach().float().cpu()
        self._edited = False
        controller.edits(())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        step = step_of(self.sigmas, sigma)
        blended = self.controller.blend(x, step)
        self.controller.enter(step)
        return blended

    def finish(self, x: Tensor) -> Tensor:
        return self.controller.blend(x, self.controller.steps)

    def evaluate(self, executor: Executor, *args: Any, **kwargs: Any) -> Any:
        """Around every evaluation of all conditions: which of them are to be edited? Guiders order them as they like.

        An evaluation of other conditions only (that of Self-Attention Guidance, for example) is left alone.
        """
        call = EvaluationCall(args, kwargs)
        ours = [n for n, cond in enumerate(call["conds"]) if any(MARK in entry for entry in cond or ())]
        if not ours and not self._edited:
            raise InvalidInput(
                "Prompt-to-Prompt: the sampler's positive is another conditioning, so nothing would be edited. "
                "Connect the 'positive' output of 'Prompt-to-Prompt' to the sampler."
            )
        self._edited = True
        self.controller.edits(ours)
        return call.run(executor)


class _PromptToPromptPatch(RunPatch):
    key = "retrace_prompt_to_prompt"
    node = "Prompt-to-Prompt"

    def __init__(self, edit: PromptToPrompt) -> None:
        super().__init__()
        self.edit = edit

    def begin(self, call: SamplerCall) -> _PromptToPromptRun:
        noise: Tensor = call["noise"]
        if noise.shape[0] != self.edit.prompts:
            raise InvalidInput(
                f"Prompt-to-Prompt has {self.edit.prompts} prompts (the source first), but the sampler works on a "
                f"batch of {noise.shape[0]}. Give it one latent for each prompt: connect the LATENT output of "
                "'Prompt-to-Prompt' to the sampler."
            )
        call["noise"] = noise[:1].repeat(len(noise), *[1] * (noise.ndim - 1))
        sigmas: Tensor = call["sigmas"]
        run = _PromptToPromptRun(self.edit.start(len(sigmas) - 1), sigmas.clone())
        # Only now, because what other packs patched into the attention in the meantime must be there to be kept.
        arguments = dict(call["extra_args"])
        options = comfy.model_patcher.create_model_options_clone(arguments.get("model_options", {}))
        install_attention(options, call["model_wrap"].inner_model.diffusion_model, run.controller)
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        comfy.patcher_extension.add_wrapper_with_key(kind, self.key, run.evaluate, options, is_model_options=True)
        arguments["model_options"] = options
        call["extra_args"] = arguments
        return run
