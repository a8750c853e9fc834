"""The scene parser against ground truth: clean, degraded and malformed pictures."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from retrace.core.errors import InvalidImage, RetraceError
from retrace.models.pebble import scenes
from retrace.models.pebble.scenes import Ground, Object, Scene
from tools.scene_parser import UNKNOWN, ParsedScene, found, match_ground, parse

COUNT = 300


@lru_cache
def pictures() -> list[tuple[Scene, Tensor]]:
    return [(s, scenes.render(s)) for s in scenes.heldout(COUNT)]


def is_right(scene: Scene, parsed: ParsedScene) -> bool:
    """Ground, and every object with colour, shape and centre within 2 px, and no others."""
    return (
        parsed.ground == scene.ground.name
        and len(parsed.objects) == len(scene.objects)
        and all(
            any(math.hypot(p.x - o.x, p.y - o.y) <= 2 for p in parsed.find(o.colour, o.shape)) for o in scene.objects
        )
    )


def blurred(image: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma)))


def noisy(image: Tensor, std: float, seed: int) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + std * noise).clamp(0, 1)


def wobbly(image: Tensor, seed: int) -> Tensor:
    """Moves every pixel by about 0.8 px, smoothly over 6 px."""
    rng = np.random.default_rng(seed)
    shifts = [ndimage.gaussian_filter(rng.standard_normal(image.shape[1:]), 6) for _ in range(2)]
    where = np.indices(image.shape[1:]) + np.stack([0.8 * s / s.std() for s in shifts])
    moved = [ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in image.numpy()]
    return torch.from_numpy(np.stack(moved))


def jpeg(image: Tensor, quality: int) -> Tensor:
    pillow = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pillow.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(pillow.open(file)).copy()).permute(2, 0, 1) / 255


def picture(mask: Tensor | np.ndarray, colour: str = "red", ground: str = "sand") -> Tensor:
    """A mask in one colour on a plain ground, its edge softened as a rendered one."""
    soft = torch.from_numpy(ndimage.gaussian_filter(np.asarray(mask, dtype=np.float32), 0.8))
    fore, back = (torch.tensor(t)[:, None, None] for t in (scenes.COLOURS[colour], scenes.GROUNDS[ground]))
    return back + (fore - back) * soft


def test_reads_clean_heldout_scenes() -> None:
    parsed = [(s, parse(image)) for s, image in pictures()]
    assert sum(is_right(*pair) for pair in parsed) >= 0.99 * COUNT
    assert sum(s.ground.texture == p.texture for s, p in parsed) >= 0.99 * COUNT


def test_reads_blurred_noisy_scenes() -> None:
    right = [is_right(s, parse(noisy(blurred(image, 1.5), 0.03, i))) for i, (s, image) in enumerate(pictures())]
    assert sum(right) >= 0.97 * COUNT


def test_reads_shifted_colours_and_compression() -> None:
    shift = torch.rand(COUNT, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.1 - 0.05
    some = range(0, COUNT, 3)
    right = [is_right(pictures()[i][0], parse(jpeg((pictures()[i][1] + shift[i]).clamp(0, 1), 60))) for i in some]
    assert sum(right) >= 0.97 * len(right)


def test_reads_wobbly_outlines() -> None:
    right = [is_right(s, parse(wobbly(image, i))) for i, (s, image) in enumerate(pictures()[:100])]
    assert sum(right) >= 95


def test_mask_centre_size_and_angle() -> None:
    for scene, image in pictures()[:60]:
        parsed = parse(image)
        for obj, mask in zip(scene.objects, scenes.instance_masks(scene), strict=True):
            (hit,) = parsed.find(obj.colour, obj.shape)
            assert hit.mask.shape == mask.shape and hit.mask.sum() == hit.area
            common = (hit.mask * mask).sum()
            assert common / (hit.area + mask.sum() - common) > 0.95
            assert math.hypot(hit.x - obj.x, hit.y - obj.y) < 0.5
            assert hit.radius == pytest.approx(obj.radius, rel=0.03)
            turn = {"square": math.pi / 2, "triangle": 2 * math.pi / 3, "star": 2 * math.pi / 5}.get(obj.shape)
            if turn is not None:
                assert abs((hit.angle - obj.angle + turn / 2) % turn - turn / 2) < math.radians(6)


@pytest.mark.parametrize("ground", scenes.GROUNDS)
def test_empty_ground_has_no_objects(ground: str) -> None:
    for i, texture in enumerate(scenes.TEXTURES):
        for period in (16.0, 20.0, 24.0):
            empty = scenes.render(Scene(Ground(ground, texture, period, texture_angle=i + 0.4, light=0.07)))
            for image in (empty, noisy(empty, 0.03, i), jpeg(empty, 60), blurred(empty, 1.5)):
                parsed = parse(image)
                assert (parsed.ground, parsed.texture, parsed.objects) == (ground, texture, ())


def test_found_answers_only_what_is_there() -> None:
    scene = Scene(Ground("stone", "dotted"), (Object("purple", "star", 40, 44, 20, 0.3),))
    image = scenes.render(scene)
    asked = {(c, s): found(image, c, s) for c in scenes.COLOURS for s in scenes.SHAPES}
    assert [pair for pair, answer in asked.items() if answer] == [("purple", "star")]


def test_found_in_a_region() -> None:
    image = scenes.render(Scene(Ground("grass"), (Object("blue", "square", 40, 90, 20),)))
    left, top = torch.zeros(2, scenes.SIZE, scenes.SIZE)
    left[:, :64] = 1
    top[:64] = 1
    assert found(image, "blue", "square", left)
    assert not found(image, "blue", "square", top)
    assert found(parse(image), "blue", "square", left)


@pytest.mark.parametrize("colours", [("red", "blue"), ("orange", "yellow"), ("white", "black"), ("purple", "red")])
def test_touching_objects_are_separated(colours: tuple[str, str]) -> None:
    objects = (Object(colours[0], "square", 40, 64, 22), Object(colours[1], "circle", 40 + 19.8 + 21, 64, 21))
    for image in (clean := scenes.render(Scene(Ground("water"), objects)), noisy(blurred(clean, 1), 0.03, 0)):
        parsed = parse(image)
        assert {(o.colour, o.shape) for o in parsed.objects} == {(colours[0], "square"), (colours[1], "circle")}


def test_an_outline_is_no_object() -> None:
    """Half-way from red to a light ground lies nearly the orange that is also in the picture."""
    ring = Scene(Ground("sand"), (Object("red", "circle", 44, 44, 30), Object("orange", "circle", 96, 96, 18)))
    assert is_right(ring, parse(blurred(scenes.render(ring), 1.5)))


y, x = torch.meshgrid(torch.arange(128.0) - 63.5, torch.arange(128.0) - 63.5, indexing="ij")
STAR = scenes.signed_distance(Object("red", "star", 64, 64, 24)) < 0
MALFORMED = {
    "between circle and square": x.abs() ** 3.5 + y.abs() ** 3.5 < 22**3.5,
    "ellipse": (x / 1.25) ** 2 + (y * 1.1) ** 2 < 22**2,
    "rectangle": (x.abs() < 26) & (y.abs() < 17),
    "half circle": (torch.hypot(x, y) < 26) & (x > 0),
    "ring": (torch.hypot(x, y) < 26) & (torch.hypot(x, y) > 10),
    "star without an arm": STAR & ~((y < -10) & (x.abs() < 12)),
    "melted star": ndimage.gaussian_filter(STAR.numpy().astype(np.float32), 6) > 0.5,
    "two circles in one": (torch.hypot(x - 14, y) < 18) | (torch.hypot(x + 14, y) < 18),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_shape_has_no_name(name: str) -> None:
    (blob,) = parse(picture(MALFORMED[name])).objects
    assert (blob.colour, blob.shape) == ("red", UNKNOWN)
    assert not any(found(picture(MALFORMED[name]), "red", s) for s in scenes.SHAPES)


def test_a_foreign_colour_is_reported_without_a_name() -> None:
    disc = torch.hypot(x, y) < 20
    image = picture(disc)
    image[:, disc] = torch.tensor((0.2, 0.85, 0.9))[:, None]  # cyan
    (blob,) = parse(image).objects
    assert (blob.colour, blob.shape) == (UNKNOWN, "circle")


def test_a_cut_and_a_small_object() -> None:
    assert parse(picture(torch.hypot(x, y) < 4)).objects == ()
    (cut,) = parse(picture(torch.hypot(x - 64, y) < 25)).objects
    assert cut.shape == UNKNOWN


def emptied(index: int) -> tuple[Scene, Tensor, Tensor, Tensor]:
    """A scene of two objects without its first one, its picture, where that one was, and the pixels of the other."""
    scene = scenes.sample_scene(scenes.scene_rng("train", 700_000 + index), objects=2)
    place, _ = scenes.instance_masks(scene, 6)
    left = replace(scene, objects=scene.objects[1:])
    return left, scenes.render(left), place, scenes.instance_masks(left, 4)[0]


def test_ground_that_goes_on_is_the_same() -> None:
    for index in range(40):
        scene, image, place, other = emptied(index)
        assert match_ground(image, place, other).same, scene
        assert match_ground(noisy(blurred(image, 0.7), 0.01, index), place, other).same, scene


@pytest.mark.parametrize("change", ["name", "texture", "object", "smear"])
def test_a_patch_of_anything_else_is_not_the_same(change: str) -> None:
    for index in range(40):
        scene, image, place, other = emptied(index)
        ground = scene.ground
        patch = scenes.Object("white", "circle", 0, 0, 14)
        rows, columns = place.nonzero().float().mean(0).tolist()
        if change == "name":
            names = [n for n in scenes.GROUNDS if n != ground.name]
            new = scenes.render(replace(scene, ground=replace(ground, name=names[index % len(names)])))
        elif change == "texture":  # dots for stripes are too alike in a small region
            new = scenes.render(
                replace(scene, ground=replace(ground, texture="striped" if ground.texture == "plain" else "plain"))
            )
        elif change == "object":
            new = scenes.render(replace(scene, objects=(replace(patch, x=columns, y=rows), *scene.objects)))
        else:
            new = image + 0.04
        match = match_ground((image * (1 - place) + new * place).clamp(0, 1), place, other)
        assert not match.same, (scene, match)


def test_a_region_must_leave_something_to_compare() -> None:
    image = pictures()[0][1]
    with pytest.raises(InvalidImage, match="0 px outside"):
        match_ground(image, torch.ones(128, 128))
    with pytest.raises(InvalidImage, match="0 px inside"):
        match_ground(image, torch.zeros(128, 128))
    with pytest.raises(InvalidImage, match=r"\[64, 64\].*\[128, 128\]"):
        match_ground(image, torch.ones(64, 64))


def test_hopeless_pictures_do_not_crash() -> None:
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert parse(noise).ground == UNKNOWN
    for level in (0.0, 1.0):
        assert parse(torch.full((3, 128, 128), level)).ground == UNKNOWN
    assert not any(found(blurred(noise, 4), "red", s) for s in scenes.SHAPES)


def test_same_picture_same_answer() -> None:
    image = pictures()[1][1]
    before = image.clone()
    assert parse(image) == parse(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.zeros(1, 3, 128, 128), r"\[1, 3, 128, 128\].*\[3, H, W\]"),
        (torch.zeros(128, 128, 3), "permute"),
        (torch.zeros(4, 128, 128), r"\[3, H, W\]"),
        (torch.full((3, 128, 128), -1.0), "-1..1"),
        (torch.full((3, 128, 128), math.nan), "NaN"),
    ],
)
def test_bad_images_are_refused(image: Tensor, text: str) -> None:
    with pytest.raises(InvalidImage, match=text):
        parse(image)


def test_bad_questions_are_refused() -> None:
    image = pictures()[0][1]
    with pytest.raises(RetraceError, match=r"pink circle.*red, orange"):
        found(image, "pink", "circle")
    with pytest.raises(InvalidImage, match=r"\[64, 64\].*\[128, 128\]"):
        found(image, "red", "circle", torch.ones(64, 64))
