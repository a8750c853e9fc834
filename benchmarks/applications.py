"""What blending is used for, as tasks on Pebble's scenes: an image, a mask, words, and what counts as success.

Success is always read from the image as a user gets it, after Paste Background, by the scene parser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from retrace.blending.blend import NoiseMode
from retrace.clip_guidance.ranking import Region
from retrace.masks import LatentMaskMode, mask_precision
from retrace.models.pebble.scenes import (
    COLOURS,
    GROUNDS,
    SHAPES,
    SIZE,
    TEXTURES,
    Object,
    Scene,
    instance_masks,
    render,
    sample_object,
    sample_scene,
)
from tools.scene_parser import ParsedScene, match_ground, parse

SIDE = 80
"""Pixels that extrapolation adds on each side; the rest of the model's window is the image's own border."""
SOFT = 4
"""Pixels around an object that its soft edge reaches, for comparing grounds."""


@dataclass(frozen=True)
class Recipe:
    """How an application is done. ``margin`` in pixels around the object and ``level`` of 5 (the bounding box) make the
    mask; the rest are inputs of KSampler, Blend Step, Paste Background and Rank by CLIP by their names."""

    margin: float = 3
    level: int = 5
    strength: float = 1.0
    steps: int = 50
    guidance: float = 7.5
    shrink: int = 0
    cells: LatentMaskMode = "area"
    noise: NoiseMode = "fresh"
    feather: float = 3.0
    words: str = "scene"  # what the prompt says; each application below lists its kinds
    negative: str = ""
    beside: bool = False  # a second object stands by, which stays
    rank: Region = "whole"


@dataclass(frozen=True)
class Task:
    """One edit. Images are ``[H, W, 3]``, the mask ``[H, W]``, 1 = edit.

    ``start`` is what the sampler starts from and ``keep`` what stays outside of the mask. ``score`` are the words for
    ranking, ``region`` where they are to be seen. ``success`` judges the pasted image ``[3, H, W]``.
    """

    keep: Tensor
    start: Tensor
    mask: Tensor
    prompt: str
    negative: str
    score: str
    success: Callable[[Tensor], bool]


def nhwc(scene: Scene) -> Tensor:
    return render(scene).permute(1, 2, 0).contiguous()


def shows(scene: ParsedScene, objects: tuple[Object, ...], near: float = math.inf) -> bool:
    """Exactly these objects by colour and shape and no others, each centred within ``near`` pixels of its place."""
    seen = list(scene.objects)
    for wanted in objects:
        hits = [
            o
            for o in seen
            if (o.colour, o.shape) == (wanted.colour, wanted.shape)
            and math.hypot(o.x - wanted.x, o.y - wanted.y) < near
        ]
        if not hits:
            return False
        seen.remove(hits[0])
    return not seen


def mask_of(scene: Scene, thing: Object, recipe: Recipe) -> Tensor:
    """The mask ``[H, W]`` of ``thing``, which leaves out the scene's other objects with their soft edges."""
    mask = mask_precision(instance_masks(replace(scene, objects=(thing,)), recipe.margin), recipe.level)[0]
    for near in instance_masks(replace(scene, objects=tuple(o for o in scene.objects if o != thing)), SOFT):
        mask = mask * (1 - near)
    return mask


def other(rng: np.random.Generator, names: tuple[str, ...], than: str) -> str:
    return str(rng.choice([n for n in names if n != than]))


def replacement(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """The object becomes one of another colour and another shape; one beside it stays.

    Success: the new object in the mask, the others as they were, nothing else.
    """
    scene = sample_scene(rng, objects=2 if recipe.beside else 1)
    old, *others = scene.objects
    new = replace(old, colour=other(rng, tuple(COLOURS), old.colour), shape=other(rng, SHAPES, old.shape))
    return [_painted(scene, new, tuple(others), mask_of(scene, old, recipe), recipe)]


def _painted(
    scene: Scene, new: Object, others: tuple[Object, ...], mask: Tensor, recipe: Recipe, start: Tensor | None = None
) -> Task:
    target = replace(scene, objects=(new, *others))
    keep = nhwc(scene)
    texts = {
        "scene": target.caption(),
        "object and ground": replace(target, objects=(new,)).caption(),
        "object": new.phrase(),
        "plain": target.caption(with_details=False),
        "no size": f"{new.phrase(with_size=False)} on {scene.ground.phrase()}",
        "large": f"a large {new.colour} {new.shape} on {scene.ground.phrase()}",
        "no colour": target.caption().replace(f"{new.colour} ", "", 1),
    }

    def success(image: Tensor) -> bool:
        seen = parse(image)
        return shows(seen, target.objects) and bool(seen.find(new.colour, new.shape, mask))

    words = texts[recipe.words]
    return Task(keep, keep if start is None else start, mask, words, recipe.negative, words, success)


def addition(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """A new object on free ground, in a box that the user draws; one beside it stays.

    Success: the new object in the mask, the other as it was, nothing else.
    """
    target = sample_scene(rng, objects=2 if recipe.beside else 1)
    new, *others = target.objects
    return [_painted(replace(target, objects=tuple(others)), new, tuple(others), mask_of(target, new, recipe), recipe)]


def removal(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """The first object goes; a second one stays.

    Success: the parser sees what was left and nothing else, and the ground in the mask continues the one around it.
    """
    scene = sample_scene(rng, objects=int(rng.integers(1, 3)))
    old, *others = scene.objects
    mask, left = mask_of(scene, old, recipe), replace(scene, objects=tuple(others))
    soft = instance_masks(left, SOFT).amax(0) if others else None
    words = {"scene": left.caption(), "ground": scene.ground.phrase(), "empty": ""}[recipe.words]
    negative = old.phrase() if recipe.negative == "object" else recipe.negative

    def success(image: Tensor) -> bool:
        return shows(parse(image), left.objects) and match_ground(image, mask, soft).same

    keep = nhwc(scene)
    return [Task(keep, keep, mask, words, negative, left.caption(), success)]


def background(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """The ground becomes another one, with another texture; the object stays (the mask is inverted).

    Success: the object at its place, nothing else, and ground and texture are those asked for.
    """
    scene = sample_scene(rng, objects=1)
    ground = replace(
        scene.ground,
        name=other(rng, tuple(GROUNDS), scene.ground.name),
        texture=other(rng, TEXTURES, scene.ground.texture),
    )
    target = replace(scene, ground=ground)

    def success(image: Tensor) -> bool:
        seen = parse(image)
        return (seen.ground, seen.texture) == (ground.name, ground.texture) and shows(seen, scene.objects, near=3)

    keep = nhwc(scene)
    words = {"scene": target.caption(), "ground": ground.phrase()}[recipe.words]
    negative = scene.objects[0].phrase() if recipe.negative == "object" else recipe.negative
    return [Task(keep, keep, 1 - mask_of(scene, scene.objects[0], recipe), words, negative, target.caption(), success)]


def scribble(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """A zigzag of one colour, as wide as the object to be, is noised up to ``strength`` and becomes the object.

    Success: an object of the scribble's colour and the named shape in the mask, the other as it was, nothing else.
    """
    target = sample_scene(rng, objects=2 if recipe.beside else 1)
    new, *others = target.objects
    scene = replace(target, objects=tuple(others))
    start = draw_stroke(nhwc(scene), new, rng)
    return [_painted(scene, new, tuple(others), mask_of(target, new, recipe), recipe, start)]


def draw_stroke(image: Tensor, thing: Object, rng: np.random.Generator, width: float = 7.0) -> Tensor:
    """``image`` ``[H, W, 3]`` with a zigzag of six strokes at ``thing``'s place, in its colour."""
    reach, turns = 0.85 * thing.radius, 6
    along = np.linspace(-reach, reach, turns + 1)
    across = np.where(np.arange(turns + 1) % 2, 1.0, -1.0) * np.sqrt(np.maximum(reach**2 - along**2, 0.0))
    points = np.stack([along, across], -1) + rng.normal(0, 1.5, (turns + 1, 2)) + [thing.x, thing.y]
    axis = torch.arange(image.shape[0]) + 0.5
    x, y = axis[None, :], axis[:, None]
    distance = torch.full(image.shape[:2], math.inf)
    for (x0, y0), (x1, y1) in pairwise(points):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = (((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length).clamp(0, 1)
        distance = torch.minimum(distance, torch.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)))
    cover = (width / 2 - distance + 0.5).clamp(0, 1)[..., None]
    return torch.lerp(image, torch.tensor(COLOURS[thing.colour]), cover)


def extrapolation(rng: np.random.Generator, recipe: Recipe) -> list[Task]:
    """The image grows by :data:`SIDE` pixels to the left and to the right, each side from its own words.

    Every side is one window of the model's size: half new, half the image's own border. Two tasks, left and right.
    Success of each: its object on its side, whole and alone, and the window shows the image's ground and texture.
    """
    scene = sample_scene(rng, objects=1)
    image = nhwc(scene)
    tasks = []
    for left in (True, False):
        kept = image[:, : SIZE - SIDE] if left else image[:, SIDE:]
        pad = (kept[:, :1] if left else kept[:, -1:]).expand(SIZE, SIDE, 3)  # repeats the border, as feathering needs
        window = torch.cat([pad, kept] if left else [kept, pad], dim=1)
        mask = torch.zeros(SIZE, SIZE)
        mask[:, slice(0, SIDE) if left else slice(SIZE - SIDE, SIZE)] = 1
        new = sample_object(rng)
        words = {
            "no size": f"{new.phrase(with_size=False)} on {scene.ground.phrase()}",
            "small": f"a small {new.colour} {new.shape} on {scene.ground.phrase()}",
        }[recipe.words]

        def success(image: Tensor, mask: Tensor = mask, new: Object = new) -> bool:
            seen = parse(image)
            there = [(o.colour, o.shape) for o in seen.objects if mask[int(o.y), int(o.x)] > 0.5]
            ground = (scene.ground.name, scene.ground.texture)
            return there == [(new.colour, new.shape)] and (seen.ground, seen.texture) == ground

        tasks.append(Task(window, window, mask, words, recipe.negative, words, success))
    return tasks


Maker = Callable[[np.random.Generator, Recipe], list[Task]]
PAINT = Recipe(margin=18, steps=16, guidance=5.0, words="no size")
APPLICATIONS: dict[str, tuple[Maker, Recipe]] = {
    "replace": (replacement, PAINT),
    "add": (addition, PAINT),
    "remove": (removal, Recipe(margin=6, steps=12, guidance=2.0, words="ground")),
    "background": (
        background,
        Recipe(margin=0, level=0, steps=16, guidance=2.0, cells="max", feather=0, words="ground"),
    ),
    "scribble": (scribble, replace(PAINT, margin=8, strength=0.7)),
    "extrapolate": (extrapolation, Recipe(steps=20, guidance=4.0, feather=0, words="no size")),
    "replace, beside another": (replacement, replace(PAINT, words="object and ground", beside=True)),
    "add, beside another": (addition, replace(PAINT, words="object and ground", beside=True)),
    "scribble, beside another": (scribble, replace(PAINT, margin=8, strength=0.7, beside=True)),
}
"""Chosen on training scenes. Where another object stands beside, the words name the new one and the ground only."""
