"""Blend Step inside ComfyUI: any core sampler then only edits inside the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....blending.blend import Blend, BlendRun, Level, NoiseMode
from ....core.checks import check_latent, check_mask, describe
from ....core.errors import InvalidImage
from ....core.trajectory import Trajectory
from ....masks import LatentMaskMode, latent_mask
from ..calls import SamplerCall
from ..host import ComfyHost
from .run_patch import RunPatch


def patch_blend(
    model: Any,
    source: Mapping[str, Any] | Trajectory,
    mask: Tensor,
    *,
    noise: NoiseMode = "fixed",
    level: Level = "next",
    cells: LatentMaskMode = "max",
    stages: int = 0,
    seed: int = 0,
) -> Any:
    """A clone of the MODEL whose samplers keep ``source`` outside ``mask``.

    Args:
        source: a LATENT dict as the VAE encodes it, or the trajectory of its inversion.
        mask: [B or 1, H, W] in pixels of the picture (or on the latent grid), 1 = edit.
        cells: what a pixel mask becomes on the latent grid, see :func:`retrace.masks.latent_mask`.
        noise, level, stages, seed: see :class:`retrace.blending.blend.Blend`.

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
    grid = _on_grid(mask, clean, host.downscale, cells)
    kept = source if isinstance(source, Trajectory) else clean
    blend = Blend(kept, grid, host.parametrisation, noise, level, stages, seed)
    patched = model.clone()
    _Patch(blend).install(patched)
    return patched


def _on_grid(mask: Tensor, latent: Tensor, cell: int, mode: LatentMaskMode) -> Tensor:
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
    return latent_mask(mask, mode=mode, size=(height, width))


class _Patch(RunPatch):
    """The wrappers of one Blend Step."""

    key = "retrace_blend"

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
