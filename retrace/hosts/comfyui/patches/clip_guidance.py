"""CLIP guidance inside ComfyUI: a patch under which every core sampler moves to where a CLIP sees the words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ....clip_guidance import ClipGuidance, GuidedRun, Schedule, linear_decoder
from ....clip_guidance.decoders import Decoder, pixels
from ....core.errors import UnsupportedModel
from ..calls import PredictionCall, SamplerCall
from ..gradients import (
    ConstantControl,
    constant_controls,
    differentiable_attention,
    gradient_clone,
    gradient_mode,
    reserve_graph_memory,
    settle_hooks,
)
from ..host import ComfyHost
from ..image_text import on_compute_device
from ..plain import alias
from ..types import Executor, Guider, Model, Options, Vae
from .run_patch import RunPatch

_DDPM = ("sample_euler_ancestral", "sample_ddpm")  # core's samplers whose noise has the variance of DDPM's posterior


def patch_clip_guidance(
    model: Model,
    guidance: ClipGuidance,
    schedule: Schedule,
    *,
    vae: Vae = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    seed: int = 0,
) -> Model:
    """A clone of the MODEL whose samplers are guided.

    Args:
        guidance: what the image is to become.
        schedule: the path of the gradient; its noise levels are those of the two percents, as core counts them. A move
            by the ``"variance"`` is one by the ``"score"`` under samplers that have no such variance.
        vae: makes the image, a full one or TAESD; without one a linear map of the latent to colours, and the latent
            itself where the model works on pixels.
        seed: of the views that the CLIP gets.

    Raises:
        UnsupportedModel: neither a VAE nor a linear map for this model's latents, or weights without a gradient.
    """
    host = ComfyHost(model, vae=vae)
    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    patched = gradient_clone(model) if schedule.path == "full" else model.clone()
    _ClipGuidancePatch(host, guidance, replace(schedule, first=first, last=last), seed).install(patched)
    return patched


def _linear_decoder(host: ComfyHost) -> Decoder:
    """Images without a VAE."""
    latents = host.model.get_model_object("latent_format")
    factors, bias = (getattr(latents, f"latent_rgb_factors{end}", None) for end in ("", "_bias"))
    if host.latent_channels == 3:
        return pixels
    if not factors or getattr(latents, "latent_rgb_factors_reshape", None) is not None:
        raise UnsupportedModel("There is no linear map to colours for this model's latents. Connect a VAE.")
    with torch.inference_mode(False):
        return linear_decoder(torch.tensor(factors), torch.tensor(bias) if bias is not None else None)


class _ClipGuidancePatch(RunPatch):
    """The wrappers of one CLIP Guidance."""

    key = "retrace_clip_guidance"
    node = "CLIP Guidance"

    def __init__(self, host: ComfyHost, guidance: ClipGuidance, schedule: Schedule, seed: int) -> None:
        super().__init__()
        self.host, self.guidance, self.schedule, self.seed = host, guidance, schedule, seed
        self.colours = None if host.vae is not None else _linear_decoder(host)

    def install(self, patcher: Model) -> None:
        super().install(patcher)
        types = comfy.patcher_extension.WrappersMP
        patcher.add_wrapper_with_key(types.OUTER_SAMPLE, self.key, self.around)
        if self.schedule.path == "full":
            patcher.add_wrapper_with_key(types.PREPARE_SAMPLING, self.key, reserve_graph_memory)

    def around(self, executor: Executor, *args: Any, **kwargs: Any) -> Any:
        """Around everything: the CLIP takes its place before core looks how much is left for the model."""
        clip = self.guidance.clip
        # What the graph of a view takes grows with the CLIP: a fifth of its weights, from ViT-B/32 to ViT-L/14.
        views = int(0.2 * clip.bytes * self.guidance.augmentations.count)
        try:
            with on_compute_device(clip, views):
                return executor(*args, **kwargs)
        finally:
            if self.guidance.lpips is not None:
                self.guidance.lpips.to("cpu")

    def begin(self, call: SamplerCall) -> _ClipGuidanceRun:
        guider = call["model_wrap"]
        if call["noise"].ndim != 4:
            raise UnsupportedModel(
                f"CLIP Guidance: latents of shape {list(call['noise'].shape)} arrived, but it is for single images, "
                "[B, C, h, w]. Video models cannot be guided yet."
            )
        # What changes the latent before the network sees it (Blend Step) must come before the gradient is taken.
        wrappers = guider.model_options["transformer_options"]["wrappers"]
        predicting = wrappers[comfy.patcher_extension.WrappersMP.PREDICT_NOISE]
        predicting[self.key] = predicting.pop(self.key)
        return _ClipGuidanceRun(self, call, guider)

    def schedule_for(self, sampler: Any) -> Schedule:
        """The schedule under this sampler of core's."""
        function = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        options = getattr(sampler, "extra_options", {})
        if function in _DDPM and options.get("eta", 1.0) == 1.0:
            return self.schedule
        return replace(self.schedule, move="score")

    def predict(self, executor: Executor, *args: Any, **kwargs: Any) -> Tensor:
        """Around every guided prediction, innermost."""
        run = cast("_ClipGuidanceRun | None", self.runs.get(id(executor.class_obj)))
        if run is None:
            return executor(*args, **kwargs)  # type: ignore[no-any-return]
        call = PredictionCall(args, kwargs)
        sigma = float(torch.as_tensor(call["timestep"]).max())
        return run.guide(call["x"], sigma, _Prediction(executor, run, call))


class _ClipGuidanceRun(GuidedRun):
    """A guided run as :class:`RunPatch` keeps it: it changes estimates, and no latent itself."""

    def __init__(self, patch: _ClipGuidancePatch, call: SamplerCall, guider: Guider) -> None:
        host = patch.host
        super().__init__(
            patch.guidance,
            patch.schedule_for(call.sampler),
            call["sigmas"],
            patch.colours or host.beside(guider.model_patcher).decode_differentiable,
            lambda: gradient_mode(guider.inner_model.diffusion_model),
            host.parametrisation,
            patch.seed,
        )
        self.key, self.guider = patch.key, guider
        self.controls: dict[int, ConstantControl] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        return x

    def differentiable_options(self, options: Options) -> Options:
        """``model_options`` under which gradients flow through a prediction."""
        options = comfy.model_patcher.create_model_options_clone(options)
        options.pop("multigpu_clones", None)
        differentiable_attention(options)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, self.key, self._batch, options, is_model_options=True
        )
        return options

    def _batch(self, executor: Executor, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Options) -> Any:
        """Around core's estimates for a list of conditions."""
        if model is not self.guider.inner_model:  # a guider's second model, whose weights have no wrappers
            with torch.inference_mode():
                estimates = executor(model, conds, x.detach(), timestep, options)
            return [alias(estimate) for estimate in estimates]
        settle_hooks(self.guider.model_patcher, conds, timestep, options)
        return executor(model, constant_controls(conds, self.controls), x, timestep, options)


class _Prediction:
    """One prediction that core asked for, as a function of the latent alone."""

    def __init__(self, executor: Executor, run: _ClipGuidanceRun, call: PredictionCall) -> None:
        self.executor, self.run, self.call = executor, run, call
        self.options: Options = call["model_options"] or {}

    def __call__(self, x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        self.call["x"] = x
        self.call["model_options"] = self.run.differentiable_options(self.options) if differentiable else self.options
        estimate: Tensor = self.call.run(self.executor)
        return estimate
