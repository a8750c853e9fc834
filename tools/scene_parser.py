"""Reads a Pebble picture back: ground, texture and every object with colour, shape, centre and mask. No network.

The parser measures whether an edit worked, so it must not be kinder than an eye: whatever stands out from the ground is
reported, a colour or a shape that is not clearly one of the known ones is called ``"unknown"``, and nothing is guessed
from what the picture ought to show.

The steps: (1) a robust fit of the ground as one colour with planar shading, where the grey contrast of the texture is
forgiven; (2) seeds, which are the solid cores of one object colour; (3) every pixel goes to the nearest of the ground
and the colours *measured* at the seeds, so that outlines lie at half coverage whatever the blur, tint or colour shift;
(4) connected components that hold a seed are the objects; (5) each is compared with the four shapes, which are drawn by
:func:`retrace.models.pebble.scenes.signed_distance` at the component's centroid and area, over all angles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from retrace.core.errors import InvalidImage, RetraceError
from retrace.models.pebble.scenes import COLOURS, GROUNDS, SHAPES, Object, signed_distance

Array = NDArray[Any]
UNKNOWN = "unknown"

# A shape gets its name when the overlap (intersection over union) with its ideal reaches MIN_OVERLAP and exceeds the
# runner-up by MIN_LEAD. Rendered shapes reach 0.92 (star) to 0.97 (circle); outlines that wobble by about a pixel cost
# up to 0.08, most where the outline is long. Just below the limits lie shapes that deserve no name: a pentagon overlaps
# a circle by 0.897, a star that lost an arm a star by 0.81, and a blob half-way between circle and square both by 0.91.
MIN_OVERLAP = {"circle": 0.90, "square": 0.87, "triangle": 0.85, "star": 0.83}
MIN_LEAD = 0.04
MIN_AREA = 100  # px: less is a speck; the smallest rendered object has 520
_MIN_CORE = 12  # px that must be left of a seed after erosion
_CORE = 2  # px of erosion: a false colour along a blurred outline is thinner than twice this

# Distances are Euclidean in RGB 0..1. Known object colours are 0.36 or more apart, and 0.44 or more from any ground.
_MAX_COLOUR = 0.26  # beyond, the colour of an object is unknown
_MIN_CONTRAST = 0.22  # nearer, a pixel of no known colour still counts as ground
_SAME_COLOUR = 0.2  # seeds nearer than this are one colour, e.g. both halves of an orange that leans to yellow
_MAX_GROUND = 0.2  # beyond, the ground is unknown, as it is where less than _MIN_GROUND of the picture fits it
_MIN_GROUND = 0.1
_TEXTURE = 0.07  # grey contrast that belongs to the ground's texture
_STRANGE = 0.11  # a pixel this far from the ground around it is no part of it
_SMOOTH = 0.012  # grey contrast below which a ground has no texture to compare

_NAMES = tuple(COLOURS)
_COLOURS = np.array(list(COLOURS.values()), dtype=np.float32)
_TURN = {"circle": 2 * math.pi, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "star": 2 * math.pi / 5}
_ANGLES = {"circle": 1, "square": 24, "triangle": 32, "star": 20}
_CANVAS, _DRAWN = 128, 40.0  # templates: pixels a side, and the nominal radius they are drawn with


@dataclass(frozen=True)
class ParsedObject:
    """One object found in a picture.

    ``colour`` and ``shape`` are names of :data:`scenes.COLOURS` and :data:`scenes.SHAPES`, or ``"unknown"``. ``x`` and
    ``y`` are the centroid in pixels (the first pixel has its middle at 0.5) and ``area`` is in px; ``mask`` ``[H, W]``
    is 1 inside. ``radius`` (nominal), ``angle`` (radians, modulo the symmetry) and ``overlap`` (IoU) are those of the
    best fitting shape, also where the fit is too poor for a name.
    """

    colour: str
    shape: str
    x: float
    y: float
    area: float
    radius: float
    angle: float
    overlap: float
    mask: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class ParsedScene:
    """What a picture of ``size`` (height, width) shows; ``objects`` from the largest to the smallest."""

    size: tuple[int, int]
    ground: str
    texture: str
    objects: tuple[ParsedObject, ...]

    def find(self, colour: str, shape: str, region: Tensor | None = None) -> tuple[ParsedObject, ...]:
        """The objects of this colour and shape; with ``region`` ``[H, W]`` only those centred where it exceeds 0.5.

        Raises:
            InvalidImage: ``region`` is not of the picture's height and width.
        """
        hits = [o for o in self.objects if (o.colour, o.shape) == (colour, shape)]
        if region is not None:
            if tuple(region.shape) != self.size:
                raise InvalidImage(f"The region is {list(region.shape)}; the picture needs [H, W] = {list(self.size)}.")
            hits = [o for o in hits if bool(region[int(o.y), int(o.x)] > 0.5)]
        return tuple(hits)


def parse(image: Tensor) -> ParsedScene:
    """Read ``image`` ``[3, H, W]`` (RGB, 0..1; Pebble's own size is 128 x 128).

    Raises:
        InvalidImage: the shape is not ``[3, H, W]`` with at least 32 px a side, or values are NaN or outside 0..1.
    """
    rgb = _checked(image)
    ground, fit = _fit_ground(rgb)
    off_ground = _ground_distance(rgb - fit)
    masks = _segment(rgb, off_ground)
    objects = sorted((_describe(rgb, m) for m in masks), key=lambda o: -o.area)
    covered = ndimage.binary_dilation(np.any(masks, axis=0), iterations=3) if masks else np.zeros(rgb.shape[:2], bool)
    return ParsedScene(rgb.shape[:2], ground, _texture((rgb - fit).mean(-1), ~covered), tuple(objects))


def found(image: Tensor | ParsedScene, colour: str, shape: str, region: Tensor | None = None) -> bool:
    """Whether ``image`` (``[3, H, W]`` in 0..1, or already parsed) shows a ``colour`` ``shape``.

    With ``region`` ``[H, W]`` the object's centre must lie inside it (where it exceeds 0.5).

    Raises:
        InvalidImage: see :func:`parse`; or ``region`` is not of the picture's height and width.
        RetraceError: a colour or shape that no scene has.
    """
    if colour not in COLOURS or shape not in SHAPES:
        raise RetraceError(
            f"Looking for a '{colour} {shape}', which no scene has. Ask for one of {', '.join(COLOURS)} "
            f"and one of {', '.join(SHAPES)}."
        )
    scene = image if isinstance(image, ParsedScene) else parse(image)
    return bool(scene.find(colour, shape, region))


@dataclass(frozen=True)
class GroundMatch:
    """How a region's pixels compare with the ground around it.

    ``share`` of them have its colour there, shading included and texture forgiven; ``shift`` is the distance of their
    mean colour from it in RGB 0..1; ``contrast`` is the grey contrast of their texture over that of the surroundings,
    1 where both are plain.
    """

    share: float
    shift: float
    contrast: float

    @property
    def same(self) -> bool:
        """The region continues the ground: no object, no patch of another colour, no smoothed or invented texture."""
        return self.share >= 0.97 and self.shift <= 0.05 and 0.5 <= self.contrast <= 2


def match_ground(image: Tensor, region: Tensor, others: Tensor | None = None) -> GroundMatch:
    """Compare ``region`` ``[H, W]`` (where it exceeds 0.5) of ``image`` ``[3, H, W]`` with the ground outside of it.

    ``others`` ``[H, W]`` are pixels that count for neither side, for example objects with their soft edges.

    Raises:
        InvalidImage: see :func:`parse`; a region of another size, or one that leaves nothing on either side.
    """
    rgb = _checked(image)
    inside = _region(region, rgb)
    ignored = np.zeros_like(inside) if others is None else _region(others, rgb)
    inside, outside = inside & ~ignored, ~inside & ~ignored
    if min(inside.sum(), outside.sum()) < MIN_AREA:
        raise InvalidImage(
            f"The region leaves {inside.sum()} px inside and {outside.sum()} px outside; at least {MIN_AREA} of each "
            "are needed to compare grounds."
        )
    _, fit = _fit_ground(rgb, outside)
    residual = rgb - fit
    grey = residual.mean(-1)
    ground = outside & (_ground_distance(residual) < _STRANGE)
    around = float(grey[ground].std()) if ground.any() else 0.0
    return GroundMatch(
        share=float((_ground_distance(residual) < _STRANGE)[inside].mean()),
        shift=float(np.linalg.norm(residual[inside].mean(0))),
        contrast=max(float(grey[inside].std()), _SMOOTH) / max(around, _SMOOTH),
    )


def _region(region: Tensor, rgb: Array) -> Array:
    """``region`` as booleans; raises :class:`InvalidImage` when it is not of the picture's height and width."""
    if tuple(region.shape) != rgb.shape[:2]:
        raise InvalidImage(f"The region is {list(region.shape)}; the picture needs [H, W] = {list(rgb.shape[:2])}.")
    selected: Array = (region > 0.5).cpu().numpy()
    return selected


def _checked(image: Tensor) -> Array:
    """``[H, W, 3]`` float32 in 0..1."""
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape[1:]) < 32:
        raise InvalidImage(
            f"The scene parser got an image of shape {list(image.shape)}; it needs one picture [3, H, W] of at least "
            "32 px a side. Parse a batch image by image, and permute [H, W, 3] first."
        )
    rgb: Array = image.detach().to("cpu", torch.float32).permute(1, 2, 0).contiguous().numpy()
    low, high = float(rgb.min()), float(rgb.max())
    if not (low >= -0.05 and high <= 1.05):  # also true for NaN; a little overshoot is usual for a decoder
        raise InvalidImage(
            f"The scene parser got values from {low:.3g} to {high:.3g}; it needs 0..1. "
            "Map a decoder's -1..1 with (x + 1) / 2 and clamp, and look for NaN where the picture was made."
        )
    return rgb.clip(0, 1)


def _split_grey(residual: Array) -> tuple[Array, Array]:
    """Size of the grey part (signed) and of the colourful part of a colour difference ``[..., 3]``."""
    grey = residual.mean(-1)
    return grey, np.linalg.norm(residual - grey[..., None], axis=-1)


def _fit_ground(rgb: Array, visible: Array | None = None) -> tuple[str, Array]:
    """The ground's name and its colour at every pixel ``[H, W, 3]``, without texture.

    Only ``visible`` pixels ``[H, W]`` decide, by default all.
    """

    def weight(residual: Array) -> Array:
        grey, colourful = _split_grey(residual)
        return np.exp(-((colourful / 0.08) ** 2) - (grey / 0.15) ** 2)

    height, width = rgb.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    plane = np.stack([np.ones_like(x), 2 * x / width - 1, 2 * y / height - 1], -1)
    some = np.ones((height, width), bool) if visible is None else visible
    few, basis = rgb[::2, ::2][some[::2, ::2]], plane[::2, ::2][some[::2, ::2]]
    colours = {name: np.array(colour, np.float32) for name, colour in GROUNDS.items()}
    start = max(colours.values(), key=lambda colour: float(weight(few - colour).sum()))
    weights = weight(few - start)
    for terms in (1, 1, 3, 3, 3):  # the colour settles first, then the shading
        weighted = basis[:, :terms] * weights[:, None]
        normal = weighted.T @ basis[:, :terms] + np.eye(terms)  # without support it stays at the known colour
        change = np.linalg.solve(normal, weighted.T @ (few - start))
        weights = weight(few - start - basis[:, :terms] @ change)
    distance = {name: float(np.linalg.norm(start + change[0] - colour)) for name, colour in colours.items()}
    name = min(distance, key=lambda n: distance[n])
    sure = distance[name] <= _MAX_GROUND and weights.mean() >= _MIN_GROUND
    return name if sure else UNKNOWN, (start + plane @ change).astype(np.float32)


def _ground_distance(residual: Array) -> Array:
    """How far each pixel is from the ground, texture forgiven."""
    grey, colourful = _split_grey(residual)
    return np.hypot(colourful, math.sqrt(3) * (np.abs(grey) - _TEXTURE).clip(0))


def _texture(grey: Array, visible: Array) -> str:
    """Texture name from the grey residual ``[H, W]`` of the ``visible`` ground: one wave, two crossed ones, or none."""
    if visible.mean() < 0.1:
        return UNKNOWN
    centred = np.where(visible, grey - grey[visible].mean(), 0)
    # Zero-padding makes the bins fine enough to look up the peak's partner, and square, so that a turn by 90 degrees
    # lands on a bin. The scenes use waves of 14 to 24 px.
    bins = 2 * max(grey.shape)
    power = np.abs(np.fft.fft2(centred, (bins, bins))) ** 2 / visible.sum() ** 2
    frequency = np.fft.fftfreq(bins)
    rate = np.hypot(frequency[:, None], frequency[None, :])
    power[(rate < 1 / 28) | (rate > 1 / 12)] = 0
    row, column = np.unravel_index(int(power.argmax()), power.shape)
    amplitude = 2 * math.sqrt(power[row, column])
    if amplitude < 0.015:
        return "plain"
    across = max(power[(column + i) % bins, (j - row) % bins] for i in (-1, 0, 1) for j in (-1, 0, 1))
    return "dotted" if across > 0.3 * power[row, column] else "striped"


def _segment(rgb: Array, off_ground: Array) -> list[Array]:
    """Boolean masks ``[H, W]`` of the objects."""
    to_colours = np.linalg.norm(rgb[..., None, :] - _COLOURS, axis=-1)
    nearest = to_colours.argmin(-1)
    distance = to_colours.min(-1)
    nearest[distance > _MAX_COLOUR] = len(_NAMES)  # no known colour, but not ground either
    nearest[np.where(distance > _MAX_COLOUR, _MIN_CONTRAST, distance) > off_ground] = -1

    colours: list[Array] = []
    seeds = np.zeros(rgb.shape[:2], bool)
    for label in np.unique(nearest[nearest >= 0]):
        solid = ndimage.median_filter((nearest == label).view(np.uint8), 3).view(bool)  # pixel noise is not a hole
        parts, count = ndimage.label(ndimage.binary_erosion(solid, iterations=_CORE))
        for part in range(1, count + 1):
            core = parts == part
            if core.sum() >= _MIN_CORE:
                seeds |= core
                colours.append(np.median(rgb[core], axis=0))
    measured: list[Array] = []
    for colour in colours:
        if all(np.linalg.norm(colour - other) >= _SAME_COLOUR for other in measured):
            measured.append(colour)
    if not measured:
        return []

    costs = np.stack([off_ground, *(np.linalg.norm(rgb - c, axis=-1) for c in measured)])
    # A rim half-way between object and ground can resemble a third colour. Such a component holds no seed, so its
    # pixels are decided once more without that colour.
    for _ in range(2):
        owner, masks = costs.argmin(0), []
        for index in range(1, len(costs)):
            parts, count = ndimage.label(owner == index)
            kept = np.unique(parts[seeds & (parts > 0)])
            masks += [parts == k for k in kept]
            costs[index][(parts > 0) & ~np.isin(parts, kept)] = np.inf
    return [m for m in masks if m.sum() >= MIN_AREA]


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[Array, float]]:
    """For each shape: drawings ``[angles, pixels]``, and its area in squared nominal radii."""
    drawn = {}
    for shape in SHAPES:
        centre, count = _CANVAS / 2, _ANGLES[shape]
        angles = [_TURN[shape] * i / count for i in range(count)]
        inside = [signed_distance(Object("", shape, centre, centre, _DRAWN, a), _CANVAS) < 0 for a in angles]
        stack: Array = torch.stack(inside).flatten(1).numpy()
        drawn[shape] = stack, float(stack.sum(1).mean()) / _DRAWN**2
    return drawn


def _describe(rgb: Array, mask: Array) -> ParsedObject:
    rows, columns = np.nonzero(mask)
    area = len(rows)
    y, x = rows.mean(), columns.mean()
    fits = []
    for shape, (drawings, unit) in _templates().items():
        radius = math.sqrt(area / unit)
        scale, middle = _DRAWN / radius, _CANVAS // 2
        u = ((columns - x) * scale + middle).astype(np.intp).clip(0, _CANVAS - 1)
        v = ((rows - y) * scale + middle).astype(np.intp).clip(0, _CANVAS - 1)
        common = drawings[:, v * _CANVAS + u].sum(1)
        best = int(common.argmax())
        # Both areas are equal by construction, so the union follows from the intersection.
        overlap = float(common[best] / (2 * area - common[best]))
        fits.append((overlap, shape, radius, _TURN[shape] * best / len(drawings)))
    (overlap, shape, radius, angle), (second, *_) = sorted(fits, reverse=True)[:2]
    core = ndimage.binary_erosion(mask, iterations=_CORE)
    colour = np.median(rgb[core if core.any() else mask], axis=0)
    distances = np.linalg.norm(_COLOURS - colour, axis=-1)
    return ParsedObject(
        colour=_NAMES[int(distances.argmin())] if distances.min() <= _MAX_COLOUR else UNKNOWN,
        shape=shape if overlap >= MIN_OVERLAP[shape] and overlap - second >= MIN_LEAD else UNKNOWN,
        x=float(x) + 0.5,
        y=float(y) + 0.5,
        area=float(area),
        radius=radius,
        angle=angle,
        overlap=overlap,
        mask=torch.from_numpy(mask.astype(np.float32)),
    )
