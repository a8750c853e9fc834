"""A warp by points: the masked region moves with them, and a mask says what an inpainting model has to paint.

After Inpaint4Drag (Lu and Han 2025): the region is deformed, every pixel of its new place is looked up in the old one
(so there are no cracks), and what is left to paint is where it was and no longer is, and a band along its new border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blending.fill import fill_smoothly
from ...core.checks import check_image, check_mask
from ...core.errors import InvalidImage, InvalidPoints, InvalidSetting, Remedy
from ...masks.regions import connected_parts, distance_to, part_of_each, within
from ..points import DragPoints
from .deformation import MODES, Deformation, Mode
from .field import displacement, reached_window, sample

SELECTED = 0.5
"""The region is where the mask is at least this."""
_STILL = 0.5  # px; a border of the region that moved less fits to what is beside it


@dataclass(frozen=True)
class WarpSettings:
    """How to warp.

    Args:
        mode: see :mod:`retrace.drag.warp.deformation`.
        grow: pixels by which the hole is widened, for the soft outline and the shadow that an object leaves; never
            into the region at its new place.
        border: pixels on both sides of the region's new border that are painted anew, so that it fits in. A border that
            stayed where it was keeps its pixels.
        feather: pixels over which the mask of what to paint fades out beyond that.

    Raises:
        InvalidSetting: an unknown mode, a negative number of pixels.
    """

    mode: Mode = "rigid"
    grow: int = 5
    border: int = 2
    feather: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidSetting(f"mode: got '{self.mode}', but one of {', '.join(MODES)} is needed.")
        for name, pixels in self.pixels:
            if not pixels >= 0:
                raise InvalidSetting(f"{name}: got {pixels}, but 0 or more pixels are needed.")

    @property
    def pixels(self) -> tuple[tuple[str, float], ...]:
        """The widths, by name."""
        return ("grow", self.grow), ("border", self.border), ("feather", self.feather)


@dataclass(frozen=True)
class Warped:
    """What comes out: the ``image`` ``[1, H, W, 3]`` with its hole filled, and masks ``[1, H, W]``.

    ``inpaint``: 1 where something must be painted. ``moved``: the mask where it has moved to. ``lines``: what
    happened, in words.
    """

    image: Tensor
    inpaint: Tensor
    moved: Tensor
    lines: tuple[str, ...] = field(repr=False)

    def text(self) -> str:
        """What moved, and how much has to be painted, in lines of text."""
        return "\n".join(self.lines)


@dataclass(frozen=True)
class _Part:
    """One connected part of the region at its new place: a window of the image from (``top``, ``left``)."""

    steps: int
    top: int
    left: int
    cover: Tensor  # [h, w], 0..1
    colours: Tensor  # [h, w, 3]
    travelled: Tensor  # [h, w], pixels
    area: int  # before

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.cover.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def warp_by_points(
    points: DragPoints,
    mask: Tensor | None = None,
    settings: WarpSettings | None = None,
) -> Warped:
    """Move the masked region of the points' image so that every handle comes to lie on its target.

    Separate parts of the region (8-connected) move apart from each other: each with the points on it. A point beside
    the mask counts for the nearest part; a part without points stays. Where parts come to overlap, the one with the
    later points lies on top. What moves off the image is gone.

    The hole is filled smoothly from the image around the region: neither the object that left nor the one that
    moved there shows in it, so a sampler that starts from the image (denoise below 1) is not drawn to either.

    Args:
        points: handles and targets, and the image ``[1, H, W, 3]``.
        mask: the region that moves, ``[1, H, W]`` in 0..1, from :data:`SELECTED` on. None: the whole image.
        settings: how.

    Returns:
        See :class:`Warped`; of the image's type and device. Outside the mask, the region's new place and the
        (unfeathered) hole the image is the same, bit for bit.

    Raises:
        InvalidPoints: no points, or points that contradict each other.
        InvalidImage: not an image or a mask, another size, a mask that selects nothing.
        InvalidSetting: more pixels than the image has.
        MissingPackage: scipy is not installed.
    """
    settings = settings or WarpSettings()
    picture = check_image("image of the points", points.picture)[:1]
    for name, pixels in settings.pixels:
        if pixels > max(picture.shape):
            raise InvalidSetting(f"{name}: got {pixels}, but 0 to {max(picture.shape)} pixels are needed.")
    region = _region(picture, mask)
    lines, parts, still = _move(points, picture, region, settings.mode)
    moved, taken, seam = still.to(picture), torch.zeros_like(region), torch.zeros_like(region)
    for part in parts:
        taken[part.window] |= part.cover >= SELECTED
        moved[part.window] = torch.maximum(moved[part.window], part.cover.to(picture))
        seam[part.window] |= part.travelled > _STILL
    gone = region & ~still & ~taken
    hole = within(gone, settings.grow) & ~taken
    paint = hole | _band(taken, seam, settings.border)
    image = _compose(picture, parts, hole, within(region & ~still, settings.grow), taken)
    inpaint = paint.to(picture)
    if settings.feather > 0 and bool(paint.any()):
        t = (1 - distance_to(paint, settings.feather) / (settings.feather + 1)).clamp(0, 1)
        inpaint = (t * t * (3 - 2 * t)).to(picture)
    total = region.numel()
    lines.append(
        f"to inpaint: {float(paint.sum()) / total:.1%} of the image, of which {float(gone.sum()) / total:.1%} is "
        "where something was"
    )
    return Warped(image, inpaint[None], moved[None], tuple(lines))


def _band(taken: Tensor, seam: Tensor, width: int) -> Tensor:
    """``width`` pixels on both sides of the edge of what is ``taken``, where the edge is one of a ``seam``."""
    if not width:
        return torch.zeros_like(taken)
    inner = F.pad(taken[None, None].float(), (1, 1, 1, 1), mode="replicate")  # the image's border is not an edge
    edge = taken & seam & (-F.max_pool2d(-inner, 3, 1)[0, 0] == 0)
    return within(edge, width) & (~taken | within(edge, width - 1))


def _region(picture: Tensor, mask: Tensor | None) -> Tensor:
    """The pixels that move, ``[H, W]`` (bool)."""
    height, width = picture.shape[1:3]
    if mask is None:
        return torch.ones(height, width, dtype=torch.bool, device=picture.device)
    mask = check_mask("mask", mask, size=(height, width))
    if mask.shape[0] != 1:
        raise InvalidImage(
            f"mask: got {mask.shape[0]} masks, but one is needed, because the points belong to one image. Choose one."
        )
    selected = mask[0].to(picture.device) >= SELECTED
    if not bool(selected.any()):
        raise InvalidImage(
            f"mask: its highest value is {float(mask.max()):.2g}, but what moves is where it is at least {SELECTED}.",
            Remedy.RAISE_MASK,
        )
    return selected


def _move(points: DragPoints, picture: Tensor, region: Tensor, mode: Mode) -> tuple[list[str], list[_Part], Tensor]:
    """Lines of the report, the parts at their new places in the order to draw them, and the pixels that stay."""
    if not points.pairs:
        raise InvalidPoints("points: there are none.", Remedy.PLACE_POINTS)
    height, width = region.shape
    handles = [(pair.handle[0] * width, pair.handle[1] * height) for pair in points.pairs]
    targets = [(pair.target[0] * width, pair.target[1] * height) for pair in points.pairs]
    labels, count = connected_parts(region)
    lines, members = [], dict[int, list[int]]()
    for number, (label, distance) in enumerate(part_of_each(labels, handles)):
        members.setdefault(label, []).append(number)
        if distance:
            lines.append(f"point {number + 1} lies {distance:.0f} px beside the mask and moves the nearest part of it")
    if bool(region.all()):
        lines.append(
            "the mask covers the whole image, so all of it is deformed; to move one thing, paint a mask over it"
        )
    parts, still = [], region.clone()
    numbered = torch.from_numpy(labels).to(region.device)
    for label, own in sorted(members.items(), key=lambda item: item[1][-1]):
        chosen = [handles[i] for i in own], [targets[i] for i in own]
        deformation = Deformation(*chosen, mode, [i + 1 for i in own])
        name = f"point{'s' * (len(own) > 1)} {', '.join(str(i + 1) for i in own)}"
        if chosen[0] == chosen[1]:
            lines.append(f"{name}: already at the target, nothing moves")
            continue
        shape = numbered == label
        still &= ~shape
        part = _moved_part(deformation, picture, shape)
        if part is None:
            lines.append(f"{name}: the region has left the image")
            continue
        parts.append(part)
        share = float(part.cover.sum()) / part.area
        lines.append(f"{name}: {part.area} px moved, {share:.0%} of that area after it ({_count(part.steps, 'step')})")
    if count > len(members):
        lines.append(f"{_count(count - len(members), 'part')} of the mask without points stay where they are")
    return lines, parts, still


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _moved_part(deformation: Deformation, picture: Tensor, shape: Tensor) -> _Part | None:
    """``shape`` ``[H, W]`` (bool) of ``picture`` at its new place; None where that is outside the image."""
    height, width = shape.shape
    box = reached_window(deformation, shape)
    if box is None:
        return None
    top, left = box[0].start, box[1].start
    size = (box[0].stop - top, box[1].stop - left)
    back = displacement(deformation, top, left, size, picture.device)
    y = (torch.arange(size[0], device=shape.device) + top + 0.5)[:, None] + back[1]
    x = (torch.arange(size[1], device=shape.device) + left + 0.5)[None] + back[0]
    cover = sample(shape[..., None].to(picture), x, y)[..., 0]
    cover = cover * ((x >= 0) & (y >= 0) & (x <= width) & (y <= height))
    seen = cover > 0
    if not bool(seen.any()):
        return None
    colours = picture.new_zeros(*size, 3)
    colours[seen] = sample(picture[0], x[seen], y[seen])
    return _Part(deformation.steps, top, left, cover, colours, torch.hypot(*back), int(shape.sum()))


def _compose(picture: Tensor, parts: Sequence[_Part], hole: Tensor, old: Tensor, taken: Tensor) -> Tensor:
    """``picture`` with the hole filled and the parts on it.

    What was at the ``old`` place is gone also under the soft edge of what is now at the place that is ``taken``.
    """
    image = picture[0].clone()
    unknown = old | taken  # says nothing about what is behind
    behind = not bool(unknown.all())
    if behind:
        under = hole | (old & taken)
        image[under] = fill_smoothly(image, unknown, under)
    for part in parts:
        window = image[part.window]
        cover = part.cover[..., None]
        mixed = torch.where(cover >= 1, part.colours, torch.lerp(window, part.colours, cover))
        image[part.window] = torch.where(cover > 0, mixed, window)
    if not behind:  # nothing but the moved image itself is left to fill from
        image[hole] = fill_smoothly(image, hole, hole)
    return image[None]
