"""Blend Step inside ComfyUI: any core sampler then only edits inside the mask."""

from __future__ import annotations

from torch import Tensor

from ....blending.blend import Blend, BlendRun, BlendSettings, mask_on_grid
from ....core.checks import check_latent, describe
from ....core.errors import InvalidInput, Remedy
from ....core.trajectory import Trajectory
from ..calls import SamplerCall
from ..host import ComfyHost
from ..types import Model
from .run_patch import RunPatch


def patch_blend(model: Model, source: object, mask: Tensor, settings: BlendSettings | None = None) -> Model:
    """A clone of the MODEL whose samplers keep ``source`` outside ``mask``.

    Args:
        source: a LATENT dict as the VAE encodes it, or the trajectory of its inversion.
        mask: ``[B or 1, H, W]`` in pixels of the image (or on the latent grid), 1 = edit.

    Raises:
        InvalidInput: a source that is neither, or noise ``"trajectory"`` without a trajectory.
        InvalidImage: a broken latent or mask, an empty mask, or a mask of another size than the image.
        TrajectoryMismatch: a trajectory of another kind of model.
        UnsupportedModel: a model whose noisy latents follow neither convention of this library.
    """
    settings = settings or BlendSettings()
    host = ComfyHost(model)
    kept: Tensor | Trajectory
    if isinstance(source, Trajectory):
        source.require_kind(host.parametrisation, host.latent_format)
        kept, clean = source, source.source
    elif isinstance(source, dict) and "samples" in source:
        samples = check_latent("source", source["samples"], host.latent_channels)
        kept = clean = host.to_model_scale(samples.float().cpu())
    else:
        raise InvalidInput(f"source: got {describe(source)}, but a LATENT is needed.", Remedy.ENCODE_IMAGE)
    grid = mask_on_grid(mask, clean, host.downscale, settings.cells)
    patched = model.clone()
    _BlendPatch(Blend(kept, grid, host.parametrisation, settings)).install(patched)
    return patched


class _BlendPatch(RunPatch):
    """The wrappers of one Blend Step."""

    key = "retrace_blend"
    node = "Blend Step"

    def __init__(self, blend: Blend) -> None:
        super().__init__()
        self.blend = blend
        self.flow = blend.parametrisation == "flow"

    def begin(self, call: SamplerCall) -> BlendRun:
        run = self.blend.start(call["sigmas"].clone(), call["noise"])
        mask: Tensor | None = call["denoise_mask"]
        if mask is not None and "denoise_mask_function" not in call["extra_args"].get("model_options", {}):
            # Core would hand the model a copy of the sampler's latent, so that writing to it had no effect: a latent's
            # noise mask joins ours instead. (A mask that changes over the steps, as Differential Diffusion's, stays.)
            run.restrict(mask[:, :1])
            call["denoise_mask"] = None
        return run
