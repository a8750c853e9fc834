"""CLIP guidance inside ComfyUI: a patch under which every core sampler moves to where a CLIP sees the words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ....clip_guidance import ClipGuidance, GuidedRun, Schedule, linear_decoder
from ....clip_guidance.decoders import Decoder, pixels
from ....core.errors import UnsupportedModel
from ..calls import SamplerCall
from ..gradients import (
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
from .run_patch import RunPatch

_ARGUMENTS = ("x", "timestep", "model_options", "seed")  # of core's predict_noise


def patch_clip_guidance(
    model: Any,
    guidance: ClipGuidance,
    schedule: Schedule,
    *,
    vae: Any = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    seed: int = 0,
) -> Any:
    """A clone of the MODEL whose samplers are guided.

    Args:
        guidance: what the picture shall become.
        schedule: the path of the gradient; its noise levels are those of the two percents, as core counts them.
        vae: makes the picture, a full one or TAESD; without one a linear map of the latent to colours, and the latent
            itself where the model works on pixels.
        seed: of the views that the CLIP gets.

    Raises:
        UnsupportedModel: neither a VAE nor a linear map for this model's latents, or weights without a gradient.
    """
    host = ComfyHost(model, vae=vae)
    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    patched = gradient_clone(model) if schedule.path == "full" else model.clone()
    patch = _Patch(host, _ordinary(guidance), replace(schedule, first=first, last=last), _decoder(host), seed)
    patch.install(patched)
    return patched


def _ordinary(guidance: ClipGuidance) -> ClipGuidance:
    """Mask and source as tensors that autograd may keep."""
    mask, source = (None if value is None else alias(value) for value in (guidance.mask, guidance.source))
    return replace(guidance, mask=mask, source=source)


def _decoder(host: ComfyHost) -> Decoder:
    if host.vae is not None:
        return host.decode_differentiable
    latents = host.model.get_model_object("latent_format")
    factors, bias = (getattr(latents, f"latent_rgb_factors{end}", None) for end in ("", "_bias"))
    if host.latent_channels == 3:
        return pixels
    if not factors or getattr(latents, "latent_rgb_factors_reshape", None) is not None:
        raise UnsupportedModel("There is no linear map to colours for this model's latents. Connect a VAE.")
    with torch.inference_mode(False):
        return linear_decoder(torch.tensor(factors), torch.tensor(bias) if bias is not None else None)


class _Patch(RunPatch):
    """The wrappers of one CLIP Guidance."""

    key = "retrace_clip_guidance"

    def __init__(self, host: ComfyHost, guidance: ClipGuidance, schedule: Schedule, decode: Decoder, seed: int) -> None:
        super().__init__()
        self.host, self.guidance, self.schedule, self.decode, self.seed = host, guidance, schedule, decode, seed
        self.controls: dict[int, Any] = {}
        self.before: Any = None

    def install(self, patcher: Any) -> None:
        super().install(patcher)
        types = comfy.patcher_extension.WrappersMP
        patcher.add_wrapper_with_key(types.OUTER_SAMPLE, self.key, self.around)
        if self.schedule.path == "full":
            patcher.add_wrapper_with_key(types.PREPARE_SAMPLING, self.key, reserve_graph_memory)

    def around(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
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

    def begin(self, call: SamplerCall) -> Any:
        guider = call["model_wrap"]
        if call["noise"].ndim != 4:
            raise UnsupportedModel(
                f"CLIP Guidance: latents of shape {list(call['noise'].shape)} arrived, but it is for single pictures, "
                "[B, C, h, w]. Video models cannot be guided yet."
            )
        # What changes the latent before the network sees it (Blend Step) must come before the gradient is taken.
        wrappers = guider.model_options["transformer_options"]["wrappers"]
        predicting = wrappers[comfy.patcher_extension.WrappersMP.PREDICT_NOISE]
        predicting[self.key] = predicting.pop(self.key)
        self.before, self.host._running = self.host._running, guider.model_patcher
        return _Run(
            self.guidance,
            self.schedule,
            call["sigmas"],
            self.decode,
            lambda: gradient_mode(guider.inner_model.diffusion_model),
            self.host.parametrisation,
            self.seed,
        )

    def end(self) -> None:
        self.host._running = self.before
        self.controls.clear()

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around every guided prediction, innermost."""
        run = self.runs.get(id(executor.class_obj))
        if run is None:
            return executor(*args, **kwargs)  # type: ignore[no-any-return]
        assert isinstance(run, _Run)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}

        def predict(x: Tensor) -> Tensor:
            options = given.get("model_options") or {}
            if torch.is_grad_enabled():
                options = self._with_gradients(options, executor.class_obj)
            rest = {name: value for name, value in given.items() if name not in _ARGUMENTS}
            return executor(x, given["timestep"], options, given.get("seed"), **rest)  # type: ignore[no-any-return]

        return run.guide(given["x"], float(torch.as_tensor(given["timestep"]).max()), predict)

    def _with_gradients(self, options: dict[str, Any], guider: Any) -> dict[str, Any]:
        options = comfy.model_patcher.create_model_options_clone(options)
        options.pop("multigpu_clones", None)
        differentiable_attention(options)

        def calculate(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, inner: Any) -> Any:
            if model is not guider.inner_model:  # a guider's second model, whose weights have no wrappers
                with torch.inference_mode():
                    estimates = executor(model, conds, x.detach(), timestep, inner)
                return [alias(estimate) for estimate in estimates]
            settle_hooks(guider.model_patcher, conds, timestep, inner)
            return executor(model, constant_controls(conds, self.controls), x, timestep, inner)

        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, self.key, calculate, options, is_model_options=True
        )
        return options


class _Run(GuidedRun):
    """A guided run as :class:`RunPatch` keeps it: it changes estimates, and no latent itself."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        return x
