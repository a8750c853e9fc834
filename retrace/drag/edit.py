"""A drag as a whole, between the latent of a picture and what a sampler goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidImage, RetraceError
from ..host import Conditioning, Denoiser, variance_scale
from ..inversion import Method, invert
from ..masks import latent_mask
from ..validation import check_mask, describe
from .gooddrag import GoodDragOptions, good_drag, levels_of
from .optimise import Dragged, DragOptions, drag
from .points import DragPoints, InvalidPoints
from .task import Callback, DragTask, choose_block

Mode = Literal["dragdiffusion", "gooddrag"]
MODES: tuple[Mode, ...] = ("dragdiffusion", "gooddrag")
FINER = 4  # cells of the grid per latent cell and side: half the pixels of a VAE that makes 8 pixels one cell


@dataclass(frozen=True)
class DragSettings:
    """How to drag; None everywhere is what the authors of the mode use.

    ``changes`` counts changes of the latent over all noise levels. ``hard_mask``: see :class:`DragTask`. ``block`` is
    the feature block, ``"auto"`` the paper's. ``parity`` follows the reference to the letter where this library does
    otherwise: the mask is read at one pixel per cell, and the way ends with a change nobody looks at.
    """

    mode: Mode = "dragdiffusion"
    changes: int | None = None
    learning_rate: float | None = None
    mask_weight: float | None = None
    patch_radius: int | None = None
    search_radius: int | None = None
    stop_radius: float = 2.0
    hard_mask: bool = False
    block: str = "auto"
    parity: bool = False

    def options(self, steps: int) -> DragOptions | GoodDragOptions:
        """The options of the mode for ``steps`` left to sample, with what is None left as it is there."""
        usual = DragOptions() if self.mode == "dragdiffusion" else GoodDragOptions()
        names = {field.name for field in fields(usual)}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        if isinstance(usual, GoodDragOptions) and self.changes is not None:
            # Changes in all; those of a round stay three, so there are more rounds or fewer, spread over the levels.
            given["rounds"] = max(
                1, round(self.changes / (levels_of(steps, replace(usual, parity=self.parity)) * usual.changes))
            )
            given.pop("changes")
        return replace(usual, **{name: value for name, value in given.items() if value is not None})


def drag_points(
    model: Denoiser,
    latent: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    points: DragPoints,
    mask: Tensor | None,
    settings: DragSettings,
    *,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
    inversion: Method | None = "fixed_point",
    callback: Callback | None = None,
) -> Dragged:
    """Invert the ``latent`` ``[1, C, h, w]`` of a picture to ``sigmas[0]`` and drag it there.

    ``inversion`` None means that ``latent`` is noisy already: of a trajectory, or of a generated picture on its way.
    ``mask`` ``[1, H, W]`` is 1 where the picture may change, None everywhere. ``uncond`` and ``scale`` above 1 are the
    guidance that a generated picture was made with; inverted ones are dragged without.

    Raises:
        InvalidPoints: no points.
        InvalidImage: points, mask and latent that are not of one picture; a batch.
        RetraceError, UnsupportedModel, InvalidSchedule: see :func:`drag` and :func:`good_drag`.
    """
    if settings.mode not in MODES:
        raise RetraceError(f"mode: got '{settings.mode}', but one of {', '.join(MODES)} is needed.")
    height, width = latent.shape[-2:]
    check_picture(points, height, width)
    block = choose_block(model, settings.block)
    grid = (height * FINER, width * FINER)
    handles, targets = (place.to(model.device) for place in points.on_grid(*grid))
    task = DragTask(
        model=model,
        cond=cond,
        handles=handles,
        targets=targets,
        grid=grid,
        block=block,
        mask=movable(mask, height, width, settings.parity).to(model.device),
        hard=settings.hard_mask,
        uncond=uncond,
        scale=scale,
        callback=callback,
    )
    x = latent
    if inversion is not None:
        # To the reference the picture lies at its lowest level, above zero, with the variance that latents have there.
        last = variance_scale(float(sigmas[-1]), model.parametrisation) if settings.parity else 1.0
        x = invert(model, latent * last, sigmas, cond, inversion).noise
    options = settings.options(len(sigmas) - 1)
    if isinstance(options, GoodDragOptions):
        return good_drag(task, x, sigmas, options)
    return drag(task, x, sigmas, options)


def check_picture(points: DragPoints, height: int, width: int) -> None:
    """Raise unless there are points, on a picture of the proportions of a latent of that size."""
    if not points.pairs:
        raise InvalidPoints("points: there are none. Place at least one handle and its target in 'Drag Points'.")
    high, wide = points.size
    if abs(height - width * high / wide) > 1 and abs(width - height * wide / high) > 1:
        raise InvalidImage(
            f"latent: it is {width}x{height} cells (width x height), but the points lie on a picture of {wide}x{high} "
            "pixels, which has other proportions. Encode the picture that 'Drag Points' gives out."
        )


def movable(mask: Tensor | None, height: int, width: int, parity: bool = False) -> Tensor:
    """``mask`` ``[1, H, W]`` on the latent grid ``[1, 1, h, w]``: 1 in every cell that it touches.

    ``parity``: the reference's rule, one pixel per cell by way of a grid of half the picture. A mask that gets lost in
    it is no mask at all there.
    """
    if mask is None:
        return torch.ones(1, 1, height, width)
    mask = check_mask("mask", mask)
    if len(mask) != 1:
        raise InvalidImage(f"mask: got {describe(mask)}, but one mask for the one picture is needed.")
    if (
        abs(height - width * mask.shape[1] / mask.shape[2]) > 1
        and abs(width - height * mask.shape[2] / mask.shape[1]) > 1
    ):
        raise InvalidImage(
            f"mask: it is {mask.shape[2]}x{mask.shape[1]} pixels (width x height), which are not the proportions of "
            f"the latent ({width}x{height}). Paint it on the picture that is encoded."
        )
    if not parity:
        return latent_mask(mask, mode="any", size=(height, width))[:, None].float()
    half = F.interpolate((mask > 0).float()[:, None], (mask.shape[1] // 2, mask.shape[2] // 2), mode="nearest")
    cells = F.interpolate(half, (height, width), mode="nearest")
    return cells if bool(cells.any()) else torch.ones_like(cells)  # no mask, to the reference


def conditions(conds: Mapping[str, Conditioning], scale: float) -> tuple[Conditioning, Conditioning | None]:
    """The condition to drag under and, where guidance is wanted, the unconditional one."""
    return conds["positive"], conds.get("negative") if scale > 1 else None
