"""A drag as a whole, between the latent of a picture and what a sampler goes on with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.checks import check_mask, describe
from ...core.errors import InvalidImage, InvalidPoints, RetraceError, is_out_of_memory
from ...core.host import Conditioning, FeatureDenoiser, variance_scale
from ...inversion.invert import InversionSettings, Method, invert
from ...masks import latent_mask
from ..points import DragPoints
from .gooddrag import GoodDragOptions, good_drag, levels_of
from .optimise import Dragged, DragOptions, drag
from .task import Callback, DragTask, check_single, choose_block

Mode = Literal["dragdiffusion", "gooddrag"]
MODES: tuple[Mode, ...] = ("dragdiffusion", "gooddrag")
FINER = 4  # cells of the grid per latent cell and side: half the pixels of a VAE that makes 8 pixels one cell


@dataclass(frozen=True)
class DragSettings:
    """How to drag; None everywhere is what the authors of the mode use.

    ``changes`` is the most changes of the latent over all noise levels. ``hard_mask``: see :class:`DragTask`. ``block``
    is the feature block, ``"auto"`` the paper's. ``recompute`` saves memory, see :meth:`Denoiser.differentiable`; None
    tries without, and begins again with it once memory has run out. ``parity`` follows the reference to the letter
    where this library does otherwise: the mask is read at one pixel per cell, and nothing looks where the last change
    led.
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
    recompute: bool | None = None
    parity: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RetraceError(f"mode: got '{self.mode}', but one of {', '.join(MODES)} is needed.")
        smallest = {"changes": 1, "search_radius": 1, "patch_radius": 1 if self.mode == "gooddrag" else 0}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RetraceError(f"{name}: got {value}, but at least {least} is needed in mode '{self.mode}'.")
        for name in ("learning_rate", "mask_weight", "stop_radius"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise RetraceError(f"{name}: got {value}, but a number of 0 or more is needed.")

    def options(self, steps: int) -> DragOptions | GoodDragOptions:
        """The options of the mode for ``steps`` left to sample, with what is None left as it is there."""
        usual = DragOptions() if self.mode == "dragdiffusion" else GoodDragOptions()
        names = {field.name for field in fields(usual)}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        if isinstance(usual, GoodDragOptions) and self.changes is not None:
            # Those of a round stay three, so there are more rounds or fewer, spread over the levels.
            levels = levels_of(steps, replace(usual, parity=self.parity))
            given |= {"rounds": math.ceil(self.changes / (levels * usual.changes)), "limit": self.changes}
        if isinstance(usual, GoodDragOptions):
            given.pop("changes")
        return replace(usual, **{name: value for name, value in given.items() if value is not None})


def drag_points(
    model: FeatureDenoiser,
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
    check_single(latent)
    options = settings.options(len(sigmas) - 1)
    height, width = latent.shape[-2:]
    check_picture(points, height, width)
    block = choose_block(model, settings.block)
    grid = (height * FINER, width * FINER)
    handles, targets = (place.to(model.device) for place in points.on_grid(*grid))
    area = movable(mask, height, width, settings.parity)
    punished = options.mask_weight > 0 and not bool(area.all())
    task = DragTask(
        model=model,
        cond=cond,
        handles=handles,
        targets=targets,
        grid=grid,
        block=block,
        mask=area.to(model.device),
        hard_mask=settings.hard_mask,
        cut=settings.hard_mask or not (punished or settings.parity),
        uncond=uncond if scale > 1 else None,
        scale=scale,
        recompute=settings.recompute or False,
        callback=callback,
    )
    x = latent
    if inversion is not None:
        # To the reference the picture lies at its lowest level, above zero, with the variance that latents have there.
        last = variance_scale(float(sigmas[-1]), model.parametrisation) if settings.parity else 1.0
        x = invert(model, latent * last, sigmas, cond, InversionSettings(inversion)).noise
    try:
        return _run(task, x, sigmas, options)
    except Exception as error:
        if settings.recompute is not None or not is_out_of_memory(error):
            raise
    # Out here, where the failed run no longer holds its tensors.
    return _run(replace(task, recompute=True), x, sigmas, options)


def _run(task: DragTask, x: Tensor, sigmas: Tensor, options: DragOptions | GoodDragOptions) -> Dragged:
    if isinstance(options, GoodDragOptions):
        return good_drag(task, x, sigmas, options)
    return drag(task, x, sigmas, options)


def check_picture(points: DragPoints, height: int, width: int) -> None:
    """Raise unless there are points, on a picture of the proportions of a latent of that size."""
    if not points.pairs:
        raise InvalidPoints("points: there are none. Place at least one handle and its target in 'Drag Points'.")
    high, wide = points.size
    if not alike(points.size, height, width):
        raise InvalidImage(
            f"latent: it is {width}x{height} cells (width x height), but the points lie on a picture of {wide}x{high} "
            "pixels, which has other proportions. Encode the picture that goes into 'Drag Points'."
        )


def alike(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether a picture of that size has the proportions of a latent, give or take what a VAE crops."""
    high, wide = size
    return abs(height - width * high / wide) <= 1 or abs(width - height * wide / high) <= 1


def movable(mask: Tensor | None, height: int, width: int, parity: bool = False) -> Tensor:
    """``mask`` ``[1, H, W]`` on the latent grid ``[1, 1, h, w]``: 1 in every cell that it touches.

    An empty mask is none: everything may change.

    ``parity``: the reference's rule, one pixel per cell by way of a grid of half the picture. A mask that gets lost in
    it is no mask at all there.
    """
    everything = torch.ones(1, 1, height, width)
    if mask is None:
        return everything
    mask = check_mask("mask", mask, allow_empty=True)
    if not bool(mask.any()):
        return everything
    if len(mask) != 1:
        raise InvalidImage(f"mask: got {describe(mask)}, but one mask for the one picture is needed.")
    if not alike((int(mask.shape[1]), int(mask.shape[2])), height, width):
        raise InvalidImage(
            f"mask: it is {mask.shape[2]}x{mask.shape[1]} pixels (width x height), which are not the proportions of "
            f"the latent ({width}x{height}). Paint it on the picture that is encoded."
        )
    if not parity:
        return latent_mask(mask, mode="any", size=(height, width))[:, None].float()
    half = F.interpolate((mask > 0).float()[:, None], (mask.shape[1] // 2, mask.shape[2] // 2), mode="nearest")
    cells = F.interpolate(half, (height, width), mode="nearest")
    return cells if bool(cells.any()) else everything
