"""The procedural world of Pebble: soft-edged coloured shapes on textured grounds, with exact ground truth.

Every scene is drawn from signed distance functions, so the instance masks, positions, colours and classes are known
exactly, and thousands of scenes a minute are rendered on any CPU. The edges carry a lens blur of about two pixels, as a
photograph does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SIZE = 128

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.97, 0.55, 0.06),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.08, 0.62, 0.18),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.55, 0.14, 0.72),
    "white": (0.98, 0.98, 0.98),
    "black": (0.05, 0.05, 0.06),
}
SHAPES = ("circle", "square", "triangle", "star")
GROUNDS: dict[str, tuple[float, float, float]] = {
    "grass": (0.50, 0.60, 0.42),
    "sand": (0.78, 0.70, 0.55),
    "water": (0.44, 0.58, 0.68),
    "brick": (0.62, 0.43, 0.38),
    "stone": (0.56, 0.56, 0.58),
}
TEXTURES = ("plain", "striped", "dotted")

# Radii in pixels. The size word follows from the radius; "" is the ordinary size, which captions leave unsaid.
RADII = {"small": (14.0, 19.0), "": (19.0, 25.0), "large": (25.0, 32.0)}
# Circumradius over nominal radius: how far a shape reaches from its centre.
REACH = {"circle": 1.0, "square": 1.27, "triangle": 1.45, "star": 1.35}

_EDGE = 1.7  # steepness of the soft edge: coverage = sigmoid(-_EDGE * distance in px), 10-90 % in about 2.6 px
_STAR_WAIST = 0.5  # inner over outer radius of the star


@dataclass(frozen=True)
class Object:
    """One shape. ``x`` and ``y`` are the centre in pixels, ``radius`` the nominal radius, ``angle`` in radians."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def size(self) -> str:
        return next((w for w, (low, high) in RADII.items() if low <= self.radius < high), "large")

    @property
    def reach(self) -> float:
        """Largest distance in pixels from the centre to the outline."""
        return self.radius * REACH[self.shape]

    def phrase(self, with_size: bool = True) -> str:
        words = [w for w in (self.size if with_size else "", self.colour, self.shape) if w]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@dataclass(frozen=True)
class Ground:
    """What the objects lie on. ``light`` is the strength and ``light_angle`` the direction of a soft shading."""

    name: str
    texture: str = "plain"
    period: float = 16.0
    texture_angle: float = 0.0
    phase: float = 0.0
    light: float = 0.0
    light_angle: float = 0.0

    def phrase(self, with_texture: bool = True) -> str:
        return f"{self.texture} {self.name}" if with_texture and self.texture != "plain" else self.name


@dataclass(frozen=True)
class Scene:
    ground: Ground
    objects: tuple[Object, ...] = field(default=())

    def caption(self, with_ground: bool = True, with_details: bool = True) -> str:
        """The words for this scene, e.g. ``"a large red circle and a blue star on striped sand"``."""
        things = " and ".join(o.phrase(with_details) for o in self.objects)
        ground = self.ground.phrase(with_details)
        if not things:
            return ground
        return f"{things} on {ground}" if with_ground else things


def scene_rng(split: str, index: int) -> np.random.Generator:
    """The generator behind scene ``index`` of ``"train"`` or ``"heldout"``: the two never share a seed."""
    return np.random.default_rng([{"train": 11, "heldout": 23}[split], index])


def sample_object(rng: np.random.Generator, colour: str | None = None, shape: str | None = None) -> Object:
    shape = shape or str(rng.choice(SHAPES))
    low, high = RADII[str(rng.choice(list(RADII), p=[0.25, 0.5, 0.25]))]
    radius = float(rng.uniform(low, high))
    margin = radius * REACH[shape] + 2.0
    x, y = rng.uniform(margin, SIZE - margin, 2)
    # Squares and triangles turn a little, so that they are still called by their name; stars and circles turn freely.
    turn = math.pi if shape in ("circle", "star") else math.radians(20)
    return Object(
        colour=colour or str(rng.choice(list(COLOURS))),
        shape=shape,
        x=float(x),
        y=float(y),
        radius=radius,
        angle=float(rng.uniform(-turn, turn)),
        tint=tuple(rng.uniform(-0.03, 0.03, 3).tolist()),
    )


def sample_ground(rng: np.random.Generator) -> Ground:
    return Ground(
        name=str(rng.choice(list(GROUNDS))),
        texture=str(rng.choice(TEXTURES)),
        period=float(rng.uniform(16, 24)),
        texture_angle=float(rng.uniform(0, math.pi)),
        phase=float(rng.uniform(0, 2 * math.pi)),
        light=float(rng.uniform(0, 0.07)),
        light_angle=float(rng.uniform(0, 2 * math.pi)),
    )


def sample_scene(rng: np.random.Generator, objects: int | None = None) -> Scene:
    """A random scene of ``objects`` shapes (0, 1 or 2; by default 8 %, 60 % and 32 %) that do not overlap."""
    ground = sample_ground(rng)
    if objects is None:
        objects = int(rng.choice([0, 1, 2], p=[0.08, 0.60, 0.32]))
    placed: list[Object] = []
    while len(placed) < objects:
        for _ in range(20):
            new = sample_object(rng)
            apart = all(
                math.hypot(new.x - o.x, new.y - o.y) > new.reach + o.reach + 4
                and (new.colour, new.shape) != (o.colour, o.shape)
                for o in placed
            )
            if apart:
                placed.append(new)
                break
        else:  # the first object leaves no room: begin again
            placed = []
    return Scene(ground, tuple(placed))


def heldout(count: int, start: int = 0, objects: int | None = None) -> list[Scene]:
    """``count`` evaluation scenes, the same on every machine."""
    return [sample_scene(scene_rng("heldout", i), objects) for i in range(start, start + count)]


def signed_distance(obj: Object, size: int = SIZE) -> Tensor:
    """Distance in pixels to the outline, negative inside, ``[size, size]`` (a close bound near the corners)."""
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    dx, dy = axis[None, :] - obj.x, axis[:, None] - obj.y
    dist = torch.hypot(dx, dy)
    if obj.shape == "circle":
        return dist - obj.radius
    corners = {"square": 4, "triangle": 3, "star": 5}[obj.shape]
    sector = math.pi / corners
    # Fold the plane into the sector of one corner, which then lies on the positive first axis.
    theta = torch.atan2(dy, dx) - obj.angle + math.pi / 2 + (sector if obj.shape == "square" else 0)
    theta = torch.remainder(theta + sector, 2 * sector) - sector
    u, v = dist * torch.cos(theta), dist * torch.sin(theta).abs()
    outer = obj.radius * REACH[obj.shape]
    inner = outer * (_STAR_WAIST if obj.shape == "star" else math.cos(sector))
    # The outline inside the sector is the segment from the corner (outer, 0) to the waist point at the sector's edge.
    wu, wv = inner * math.cos(sector), inner * math.sin(sector)
    length = math.hypot(outer - wu, wv)
    return (wv * (u - outer) + (outer - wu) * v) / length


def instance_masks(scene: Scene, margin: float = 0.0) -> Tensor:
    """Exact masks ``[objects, SIZE, SIZE]``, 1 inside and up to ``margin`` pixels around (the soft edge is about 2)."""
    if not scene.objects:
        return torch.zeros(0, SIZE, SIZE)
    return torch.stack([(signed_distance(o) < margin).float() for o in scene.objects])


def render(scene: Scene) -> Tensor:
    """The image, ``[3, SIZE, SIZE]`` in 0..1."""
    axis = (torch.arange(SIZE, dtype=torch.float32) + 0.5) - SIZE / 2
    x, y = axis[None, :], axis[:, None]
    g = scene.ground
    image = torch.tensor(GROUNDS[g.name])[:, None, None].expand(3, SIZE, SIZE)
    k = 2 * math.pi / (g.period * (1.25 if g.texture == "dotted" else 1.0))
    along = k * (x * math.cos(g.texture_angle) + y * math.sin(g.texture_angle)) + g.phase
    if g.texture == "striped":
        image = image + 0.055 * torch.sin(along)
    elif g.texture == "dotted":
        across = k * (y * math.cos(g.texture_angle) - x * math.sin(g.texture_angle)) + g.phase
        image = image - 0.07 * (torch.sin(along) * torch.sin(across))
    shade = (x * math.cos(g.light_angle) + y * math.sin(g.light_angle)) / (SIZE / 2)
    image = image + g.light * shade
    for o in scene.objects:
        colour = (torch.tensor(COLOURS[o.colour]) + torch.tensor(o.tint))[:, None, None]
        coverage = torch.sigmoid(-_EDGE * signed_distance(o))
        image = image + (colour + 0.5 * g.light * shade - image) * coverage
    return image.clamp(0, 1)


def render_batch(scenes: list[Scene]) -> Tensor:
    """Images ``[B, 3, SIZE, SIZE]`` in 0..1."""
    return torch.stack([render(s) for s in scenes])
