"""The scene generator: its ground truth is what every Pebble measurement stands on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from retrace.models.pebble import scenes
from retrace.models.pebble.scenes import Ground, Object, Scene

HELDOUT = scenes.heldout(150)
OBJECTS = [o for s in HELDOUT for o in s.objects]


@pytest.mark.parametrize("radius", [14.0, 22.0, 31.5])
@pytest.mark.parametrize(
    ("shape", "unit"),
    [
        ("circle", math.pi),
        ("square", 2 * 1.27**2),  # half the squared diagonal
        ("triangle", 3 / 4 * math.sqrt(3) * 1.45**2),  # equilateral with this circumradius
        ("star", 5 * 1.35**2 * 0.5 * math.sin(math.pi / 5)),  # ten triangles between tip and waist at half the radius
    ],
)
def test_mask_area_and_centroid_are_the_analytic_ones(shape: str, unit: float, radius: float) -> None:
    obj = Object("red", shape, 64.3, 63.2, radius, angle=0.2)
    rows, columns = scenes.instance_masks(Scene(Ground("sand"), (obj,)))[0].nonzero(as_tuple=True)
    assert len(rows) == pytest.approx(unit * radius**2, rel=0.02)
    assert columns.float().mean().item() + 0.5 == pytest.approx(obj.x, abs=0.3)
    assert rows.float().mean().item() + 0.5 == pytest.approx(obj.y, abs=0.3)


def test_distance_is_the_euclidean_one_along_edges() -> None:
    square = Object("red", "square", 64, 64, 20)  # unturned: sides along the axes
    half = 20 * 1.27 / math.sqrt(2)
    row = scenes.signed_distance(square)[64]
    columns = torch.arange(scenes.SIZE) + 0.5
    assert torch.allclose(row[80:], (columns[80:] - 64) - half, atol=1e-3)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_reach_bounds_the_shape_and_is_attained(shape: str) -> None:
    obj = Object("red", shape, 64, 64, 25, angle=0.1)
    rows, columns = (scenes.signed_distance(obj) < 0).nonzero(as_tuple=True)
    furthest = torch.hypot(rows + 0.5 - obj.y, columns + 0.5 - obj.x).max().item()
    assert obj.reach - 3 < furthest <= obj.reach


def test_triangle_and_star_stand_upright_at_angle_zero() -> None:
    for shape in ("triangle", "star"):
        rows, columns = (scenes.signed_distance(Object("red", shape, 64, 64, 20)) < 0).nonzero(as_tuple=True)
        tip = columns[rows == rows.min()].float().mean().item() + 0.5
        assert tip == pytest.approx(64, abs=1)
        assert 64 - rows.min().item() > rows.max().item() - 64


def test_objects_lie_inside_the_image() -> None:
    for obj in OBJECTS:
        assert obj.reach <= min(obj.x, obj.y, scenes.SIZE - obj.x, scenes.SIZE - obj.y)
    masks = torch.cat([scenes.instance_masks(s) for s in HELDOUT])
    border = torch.ones(scenes.SIZE, scenes.SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not masks[:, border].any()


def test_objects_of_a_scene_are_apart_and_distinct() -> None:
    pairs = [s for s in HELDOUT if len(s.objects) == 2]
    assert len(pairs) > 20
    for scene in pairs:
        assert scenes.instance_masks(scene).sum(0).max() == 1
        first, second = scene.objects
        gap = (scenes.signed_distance(first).clamp(min=0) + scenes.signed_distance(second).clamp(min=0)).min()
        assert gap > 2, scene.caption()
        assert (first.colour, first.shape) != (second.colour, second.shape)


def test_same_index_same_scene_and_image() -> None:
    assert scenes.heldout(10) == scenes.heldout(10)
    assert scenes.heldout(4, start=6) == scenes.heldout(10)[6:]
    scene = HELDOUT[0]
    assert torch.equal(scenes.render(scene), scenes.render(scene))
    assert torch.equal(scenes.render_batch(HELDOUT[:2])[1], scenes.render(HELDOUT[1]))


def test_sampling_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    scenes.render(scenes.heldout(1)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_splits_share_no_scene() -> None:
    train = [scenes.sample_scene(scenes.scene_rng("train", i)) for i in range(len(HELDOUT))]
    assert not set(train) & set(HELDOUT)
    with pytest.raises(KeyError):
        scenes.scene_rng("test", 0)


def test_every_class_occurs() -> None:
    assert {o.colour for o in OBJECTS} == set(scenes.COLOURS)
    assert {o.shape for o in OBJECTS} == set(scenes.SHAPES)
    assert {o.size for o in OBJECTS} == set(scenes.RADII)
    assert {s.ground.name for s in HELDOUT} == set(scenes.GROUNDS)
    assert {s.ground.texture for s in HELDOUT} == set(scenes.TEXTURES)
    assert {len(s.objects) for s in HELDOUT} == {0, 1, 2}
    for count in (0, 1, 2):
        assert all(len(s.objects) == count for s in scenes.heldout(5, objects=count))


def test_render_shows_ground_and_object_colours() -> None:
    scene = Scene(Ground("water"), (Object("orange", "square", 40, 50, 20),))
    image = scenes.render(scene)
    assert image.shape == (3, scenes.SIZE, scenes.SIZE) and image.dtype == torch.float32
    assert torch.allclose(image[:, 50, 40], torch.tensor(scenes.COLOURS["orange"]), atol=1e-3)
    assert torch.allclose(image[:, 120, 120], torch.tensor(scenes.GROUNDS["water"]), atol=1e-3)
    batch = scenes.render_batch(HELDOUT)
    assert batch.min() >= 0 and batch.max() <= 1


def test_colours_are_told_apart() -> None:
    """The parser's limits rest on these distances."""
    colours, grounds = (torch.tensor(list(t.values())) for t in (scenes.COLOURS, scenes.GROUNDS))
    assert torch.pdist(colours).min() > 0.35
    assert torch.cdist(colours, grounds).min() > 0.44


@pytest.mark.parametrize(
    ("obj", "phrase"),
    [
        (Object("red", "circle", 0, 0, 20), "a red circle"),
        (Object("orange", "star", 0, 0, 20), "an orange star"),
        (Object("orange", "star", 0, 0, 15), "a small orange star"),
        (Object("blue", "square", 0, 0, 25), "a large blue square"),
        (Object("blue", "square", 0, 0, 19), "a blue square"),
    ],
)
def test_phrase(obj: Object, phrase: str) -> None:
    assert obj.phrase() == phrase


def test_captions() -> None:
    objects = (Object("orange", "star", 40, 40, 15), Object("white", "circle", 90, 90, 20))
    scene = Scene(Ground("sand", "striped"), objects)
    assert scene.caption() == "a small orange star and a white circle on striped sand"
    assert scene.caption(with_details=False) == "an orange star and a white circle on sand"
    assert scene.caption(with_ground=False) == "a small orange star and a white circle"
    assert Scene(Ground("brick")).caption(with_ground=False) == "brick"
    assert Scene(Ground("brick", "dotted")).caption() == "dotted brick"
    for phrase in itertools.chain.from_iterable((o.phrase(), o.phrase(False)) for o in OBJECTS):
        article, word = phrase.split()[:2]
        assert article == ("an" if word == "orange" else "a")
