"""A drag as a whole, between the latent of an image and what a sampler goes on with."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...core.errors import InvalidImage, InvalidPoints, Remedy, is_out_of_memory
from ...core.host import FeatureDenoiser, variance_scale
from ...inversion.invert import InversionSettings, invert
from ..area import single_mask
from ..points import DragPoints
from .area import alike, everything, sampled_cells, touched_cells
from .gooddrag import good_drag
from .optimise import drag
from .result import Dragged
from .settings import DragOptions, DragSettings, GoodDragOptions
from .task import Callback, DragSource, DragTask, choose_block

FINER = 4  # cells of the grid per latent cell and side: half the pixels of a VAE that makes 8 pixels one cell


def drag_points(
    model: FeatureDenoiser,
    source: DragSource,
    points: DragPoints,
    mask: Tensor | None = None,
    settings: DragSettings | None = None,
    callback: Callback | None = None,
) -> Dragged:
    """Bring the latent of an image to ``source.sigmas[0]``, where it is not there already, and drag it there.

    Needs a host run with ``gradients=True``.

    Args:
        model: a UNet.
        source: the latent, its noise levels and what describes it.
        points: handles, targets and the image that they lie on, of the proportions of the latent.
        mask: ``[1, H, W]``, 1 where the image may change; None, or one that is 0 everywhere: everywhere.
        settings: how; None: DragDiffusion as its authors do.
        callback: see :data:`.task.Callback`; an exception it raises stops everything.

    Raises:
        InvalidPoints: no points.
        InvalidImage: points, mask and latent that are not of one image; a batch; an empty latent.
        InvalidSchedule: a single step, in GoodDrag.
        InvalidSetting: a feature block that the model does not have.
        UnsupportedModel: a model without feature maps.
        RetraceError: NaN from the model.
    """
    settings = settings or DragSettings()
    _check_latent(source.latent)
    options = settings.options(len(source.sigmas) - 1)
    height, width = source.latent.shape[-2:]
    _check_points(points, height, width)
    block = choose_block(model, settings.block)
    mask = single_mask(mask)
    area = _area(mask, height, width, settings)
    grid = (height * FINER, width * FINER)
    handles, targets = (place.to(model.device) for place in points.on_grid(*grid))
    punished = options.mask_weight > 0 and not bool(area.all())
    task = DragTask(
        model=model,
        source=source,
        points=points,
        mask=mask,
        settings=settings,
        handles=handles,
        targets=targets,
        grid=grid,
        block=block,
        area=area.to(model.device),
        cut=settings.hard_mask or (settings.cut and not punished),
        recompute=settings.recompute or False,
        callback=callback,
    )
    x = _noisy(model, source, settings)
    try:
        return _run(task, x, options)
    except Exception as error:
        if settings.recompute is not None or not is_out_of_memory(error):
            raise
    # Out here, where the failed run no longer holds its tensors.
    return _run(replace(task, recompute=True), x, options)


def _run(task: DragTask, x: Tensor, options: DragOptions | GoodDragOptions) -> Dragged:
    return good_drag(task, x, options) if isinstance(options, GoodDragOptions) else drag(task, x, options)


def _noisy(model: FeatureDenoiser, source: DragSource, settings: DragSettings) -> Tensor:
    """The latent at the noise level of the drag."""
    if source.noisy:
        return source.latent
    scale = variance_scale(float(source.sigmas[-1]), model.parametrisation) if settings.scaled_start else 1.0
    return invert(model, source.latent * scale, source.sigmas, source.cond, InversionSettings(settings.inversion)).noise


def _check_latent(latent: Tensor) -> None:
    if not bool(latent.any()):
        raise InvalidImage("latent: it is empty, but an image to drag is needed.", Remedy.ENCODE_IMAGE)
    if len(latent) != 1:
        raise InvalidImage(
            f"latent: got a batch of {len(latent)} images, but points belong to one.", Remedy.TAKE_ONE_LATENT
        )


def _check_points(points: DragPoints, height: int, width: int) -> None:
    if not points.pairs:
        raise InvalidPoints("points: there are none.", Remedy.PLACE_POINTS)
    high, wide = points.size
    if not alike(points.size, height, width):
        raise InvalidImage(
            f"latent: it is {width}x{height} cells (width x height), but the points lie on an image of {wide}x{high} "
            "pixels, which has other proportions. Encode the image that the points were placed on."
        )


def _area(mask: Tensor | None, height: int, width: int, settings: DragSettings) -> Tensor:
    """The cells ``[1, 1, h, w]`` that may change."""
    if mask is None:
        return everything(height, width)
    if not alike((mask.shape[1], mask.shape[2]), height, width):
        raise InvalidImage(
            f"mask: it is {mask.shape[2]}x{mask.shape[1]} pixels (width x height), which are not the proportions of "
            f"the latent ({width}x{height}). Paint it on the image that is encoded."
        )
    cells = sampled_cells if settings.cells == "sampled" else touched_cells
    return cells(mask, height, width)
