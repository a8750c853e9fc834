"""Blend Step inside ComfyUI: any core sampler then only edits inside the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...blending import Blend, BlendRun, Level, NoiseMode
from ...errors import InvalidImage
from ...masks import latent_mask
from ...trajectory import Trajectory
from ...validation import check_latent, check_mask, describe
from .host import ComfyHost

_KEY = "retrace_blend"


def patch_blend(
    model: Any,
    source: Mapping[str, Any] | Trajectory,
    mask: Tensor,
    *,
    noise: NoiseMode = "fixed",
    level: Level = "next",
    stages: int = 0,
    seed: int = 0,
) -> Any:
    """A clone of the MODEL whose samplers keep ``source`` outside ``mask``.

    Args:
        source: a LATENT dict as the VAE encodes it, or the trajectory of its inversion.
        mask: [B or 1, H, W] in pixels of the picture (or on the latent grid), 1 = edit.
        noise, level, stages, seed: see :class:`retrace.blending.Blend`.

    Raises:
        InvalidImage: a broken latent or mask, an empty mask, or a mask of another size than the picture.
        TrajectoryMismatch: a trajectory of another kind of model.
        UnsupportedModel: a model whose noisy latents follow neither convention of this library.
    """
    host = ComfyHost(model)
    if isinstance(source, Trajectory):
        source.require_kind(host.parametrisation, host.latent_format)
        clean = source.source
    else:
        if not isinstance(source, Mapping) or "samples" not in source:
            raise InvalidImage(f"source: got {describe(source)}, but a LATENT is needed. Connect a 'VAE Encode'.")
        samples = check_latent("source", source["samples"], host.latent_channels)
        clean = host.to_model_scale(samples.float().cpu())
    cells = _on_grid(mask, clean, host.downscale)
    kept = source if isinstance(source, Trajectory) else clean
    blend = Blend(kept, cells, host.parametrisation, noise, level, stages, seed)
    patched = model.clone()
    _Patch(blend).install(patched)
    return patched


def _on_grid(mask: Tensor, latent: Tensor, cell: int) -> Tensor:
    """``mask`` on the grid of ``latent``. It may have the size of the latent, or that of the picture."""
    height, width = latent.shape[-2:]
    mask = check_mask("mask", mask, allow_empty=True).float().cpu()
    if tuple(mask.shape[1:]) == (height, width):
        return check_mask("mask", mask)
    spare = [mask.shape[1] - height * cell, mask.shape[2] - width * cell]
    if not all(0 <= pixels < cell for pixels in spare):
        check_mask("mask", mask, size=(height * cell, width * cell), allow_empty=True)
    check_mask("mask", mask)
    # 'VAE Encode' cuts a picture to whole cells, as much on one side as on the other: so must its mask be.
    top, left = (pixels // 2 for pixels in spare)
    mask = mask[:, top : top + height * cell, left : left + width * cell]
    return latent_mask(mask, size=(height, width))


class _Patch:
    """The wrappers of one Blend Step. The state of a run hangs on its guider: runs side by side do not meet."""

    def __init__(self, blend: Blend) -> None:
        self.blend = blend
        self.runs: dict[int, BlendRun] = {}

    def install(self, patcher: Any) -> None:
        types = comfy.patcher_extension.WrappersMP
        patcher.add_wrapper_with_key(types.SAMPLER_SAMPLE, _KEY, self.sample)
        patcher.add_wrapper_with_key(types.PREDICT_NOISE, _KEY, self.predict)

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around a whole run of a sampler."""
        guider = args[0] if args else kwargs["model_wrap"]
        sigmas: Tensor = args[1] if len(args) > 1 else kwargs["sigmas"]
        noise: Tensor = args[4] if len(args) > 4 else kwargs["noise"]
        # A copy, because some samplers (uni_pc) write into their list of sigmas.
        run = self.blend.start(sigmas.clone(), noise)
        denoise_mask: Tensor | None = args[6] if len(args) > 6 else kwargs.get("denoise_mask")
        extra: dict[str, Any] = args[2] if len(args) > 2 else kwargs["extra_args"]
        options = extra.get("model_options", {})
        if denoise_mask is not None and "denoise_mask_function" not in options:
            # Core would hand the model a copy of the sampler's latent, so that writing to it had no effect: a latent's
            # noise mask joins ours instead. (A mask that changes over the steps, as Differential Diffusion's, stays.)
            run.restrict(denoise_mask[:, :1])
            if len(args) > 6:
                args = (*args[:6], None, *args[7:])
            else:
                kwargs["denoise_mask"] = None
        self.runs[id(guider)] = run
        try:
            samples: Tensor = executor(*args, **kwargs)
        finally:
            self.runs.pop(id(guider), None)
        # A sampler that stops early gives back a noisy latent, which flow models also divide by 1 - sigma.
        last = float(run.sigmas[-1])
        rescale = 1 - last if self.blend.parametrisation == "flow" and 0 < last < 1 else 1.0
        return run.finish(samples * rescale) / rescale

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around every guided prediction. The sampler's own tensor is changed, so that its step starts from there."""
        run = self.runs.get(id(executor.class_obj))
        if run is not None:
            x: Tensor = args[0] if args else kwargs["x"]
            timestep: Tensor | float = args[1] if len(args) > 1 else kwargs["timestep"]
            sigma = float(torch.as_tensor(timestep).max())
            blended = run(x, sigma)
            if x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled()):
                # Such a tensor must not be written. The model still sees the blend, and the end of the run is exact.
                if args:
                    args = (blended, *args[1:])
                else:
                    kwargs["x"] = blended
            else:
                x.copy_(blended)
        result: Tensor = executor(*args, **kwargs)
        return result
