"""Prompt-to-Prompt and Direct Inversion under core's samplers."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ....core.errors import RetraceError, TrajectoryMismatch
from ....core.host import AttentionCall
from ....core.schedule import step_of
from ....core.trajectory import Trajectory
from ....prompt_to_prompt import Controller, PromptToPrompt
from ..host import ComfyHost
from ..network.attention import install_attention
from ..network.unet import attention_layers
from ..prompts import MARK
from .run_patch import RunPatch, SamplerCall


def patch_prompt_to_prompt(model: Any, edit: PromptToPrompt) -> Any:
    """A clone of the MODEL whose samplers denoise the batch ``[source, target ...]`` with the attention of ``edit``.

    All images start from the noise of the first. Raises :class:`UnsupportedModel` without a UNet.
    """
    attention_layers(model.model.diffusion_model)
    patched = model.clone()
    _Patch(edit).install(patched)
    return patched


def patch_direct_inversion(model: Any, trajectory: Trajectory) -> Any:
    """A clone of the MODEL whose samplers put the first image of a batch back on ``trajectory`` at every step.

    Direct Inversion (Ju et al. 2024, arXiv 2310.01506) adds to the source branch what it is off its inverted path;
    that sum is the path itself.

    Raises:
        TrajectoryMismatch: a trajectory of another kind of model, or of several images.
    """
    host = ComfyHost(model)
    trajectory.require_kind(host.parametrisation, host.latent_format)
    images = trajectory.latents.shape[1]
    if images != 1:
        raise TrajectoryMismatch(
            f"The inversion holds {images} images, but one is needed: the source of the edit. Invert one picture."
        )
    patched = model.clone()
    _DirectPatch(trajectory).install(patched)
    return patched


class _EditRun:
    """One run of Prompt-to-Prompt: tells the controller which step runs, and blends between steps."""

    def __init__(self, controller: Controller, sigmas: Tensor) -> None:
        self.controller = controller
        self.sigmas = sigmas.detach().float().cpu()

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        step = step_of(self.sigmas, sigma)
        blended = self._blend(x, step)
        self.controller.step = step
        return blended

    def finish(self, x: Tensor) -> Tensor:
        return self._blend(x, self.controller.steps)

    def _blend(self, x: Tensor, done: int) -> Tensor:
        maps = self.controller.maps
        return x if maps is None or not done else maps.blend_latents(x, done, self.controller.steps)


class _Patch(RunPatch):
    key = "retrace_prompt_to_prompt"

    def __init__(self, edit: PromptToPrompt) -> None:
        super().__init__()
        self.edit = edit
        self._controller: Controller | None = None

    def install(self, patcher: Any) -> None:
        super().install(patcher)
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        patcher.add_wrapper_with_key(kind, self.key, self.evaluate)

    def begin(self, call: SamplerCall) -> _EditRun:
        noise: Tensor = call["noise"]
        if noise.shape[0] != self.edit.prompts:
            raise RetraceError(
                f"Prompt-to-Prompt has {self.edit.prompts} prompts (the source first), but the sampler works on a "
                f"batch of {noise.shape[0]}. Give it one latent for each prompt: connect the LATENT output of "
                "'Prompt-to-Prompt' to the sampler."
            )
        call["noise"] = noise[:1].repeat(len(noise), *[1] * (noise.ndim - 1))
        # Only now, because what other packs patched into the attention in the meantime must be there to be kept.
        arguments = dict(call["extra_args"])
        options = arguments["model_options"] = dict(arguments.get("model_options", {}))
        install_attention(options, call["model_wrap"].inner_model.diffusion_model, self.attend)
        call["extra_args"] = arguments
        sigmas: Tensor = call["sigmas"]
        self._controller = self.edit.start(len(sigmas) - 1)
        self._controller.positive = ()
        self._seen = False
        return _EditRun(self._controller, sigmas.clone())

    def end(self) -> None:
        self._controller = None

    def evaluate(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around every evaluation of all conditions: which of them are to be edited? Guiders order them as they like.

        An evaluation of other conditions only (that of Self-Attention Guidance, say) is left alone.
        """
        conds = args[1] if len(args) > 1 else kwargs["conds"]
        ours = [n for n, cond in enumerate(conds) if any(MARK in entry for entry in cond or ())]
        if self._controller is not None:
            if not ours and not self._seen:
                raise RetraceError(
                    "Prompt-to-Prompt: the sampler's positive is another conditioning, so nothing would be edited. "
                    "Connect the 'positive' output of 'Prompt-to-Prompt' to the sampler."
                )
            self._seen = True
            self._controller.positive = ours
        return executor(*args, **kwargs)

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention hook of every run; outside of one nothing is edited."""
        if self._controller is None:
            return call.attend(q, k, v)
        return self._controller(call, q, k, v)


class _DirectRun:
    def __init__(self, trajectory: Trajectory, last: float) -> None:
        self.trajectory = trajectory
        self.last = last

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return torch.cat([self.trajectory.at(sigma).to(x), x[1:]])

    def finish(self, x: Tensor) -> Tensor:
        return self(x, self.last)


class _DirectPatch(RunPatch):
    key = "retrace_direct_inversion"
    first = True  # a local blend takes the source as it then is

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        self.trajectory = trajectory
        self.flow = trajectory.parametrisation == "flow"

    def begin(self, call: SamplerCall) -> _DirectRun:
        noise: Tensor = call["noise"]
        expected = tuple(self.trajectory.noise.shape[1:])
        if tuple(noise.shape[1:]) != expected:
            raise TrajectoryMismatch(
                f"Direct Inversion holds a picture with a latent of {list(expected)}, but the sampler works on "
                f"{list(noise.shape[1:])}. Sample at the size of the inverted picture."
            )
        return _DirectRun(self.trajectory, float(call["sigmas"][-1]))
