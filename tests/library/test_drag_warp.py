"""Warp and Inpaint: moved pixels, masks by set algebra, and a scene's object at its new place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidImage, InvalidPoints, InvalidSetting
from retrace.drag.points import DragPoints, PointPair
from retrace.drag.warp.apply import Warped, WarpSettings, warp_by_points
from retrace.drag.warp.deformation import MODES, Mode
from retrace.drag.warp.field import sample
from retrace.masks.regions import within
from retrace.models.pebble.scenes import instance_masks, render, sample_scene, scene_rng
from tools.scene_parser import parse

Pixels = Sequence[tuple[tuple[float, float], tuple[float, float]]]


def pairs(moves: Pixels, picture: Tensor) -> DragPoints:
    """Points of moves ``((x, y), (x, y))`` in pixels."""
    height, width = picture.shape[1:3]
    shares = [[(x / width, y / height) for x, y in move] for move in moves]
    return DragPoints(tuple(PointPair(handle, target) for handle, target in shares), picture)


def noise(height: int = 48, width: int = 60, seed: int = 0) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def ramp(height: int, width: int) -> Tensor:
    """A picture whose red is x and whose green is y: it says where each of its pixels came from."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)], -1)[
        None
    ]


def warped(points: DragPoints, mask: Tensor | None, mode: Mode = "rigid", **settings: Any) -> Warped:
    return warp_by_points(points, mask, WarpSettings(mode, **settings))


def box(picture: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(picture.shape[:3])
    mask[:, top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("mode", MODES)
def test_a_shift_by_whole_pixels_copies_and_its_masks_are_sets(mode: Mode) -> None:
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warped(pairs([((12, 16), (21, 19))], picture), mask, mode, grow=0, border=0)
    assert torch.equal(result.image[:, 13:28, 17:29], picture[:, 10:25, 8:20])
    moved = box(picture, 13, 28, 17, 29)
    assert torch.equal(result.moved, moved)
    assert torch.equal(result.inpaint, mask * (1 - moved))
    untouched = (mask + moved) == 0
    assert torch.equal(result.image[untouched], picture[untouched])
    assert "180 px moved, 100%" in result.text()


def test_a_shift_by_part_of_a_pixel_is_bilinear() -> None:
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warped(pairs([((12, 16), (15.25, 16))], picture), mask)
    inside = result.image[:, 14:20, 14:20]
    torch.testing.assert_close(inside, 0.75 * picture[:, 14:20, 11:17] + 0.25 * picture[:, 14:20, 10:16])
    assert result.moved[0, 16, 11] == pytest.approx(0.75) and result.moved[0, 16, 23] == pytest.approx(0.25)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(128, 128), (97, 211)])
def test_every_handle_lands_on_its_target_in_the_picture(mode: Mode, size: tuple[int, int]) -> None:
    height, width = size
    picture = ramp(*size)
    moves = [
        ((0.3, 0.4), (0.42, 0.5)),
        ((0.6, 0.45), (0.71, 0.4)),
        ((0.5, 0.7), (0.5, 0.7)),
        ((0.4, 0.6), (0.42, 0.66)),
    ]
    pixels = [((a * width, b * height), (c * width, d * height)) for (a, b), (c, d) in moves]
    result = warped(pairs(pixels, picture), box(picture, height // 4, height - 20, width // 5, width - 20), mode)
    at = torch.tensor([target for _, target in pixels])
    came = sample(result.image[0], at[:, 0], at[:, 1])[:, :2] * torch.tensor([width, height])
    assert (came - torch.tensor([handle for handle, _ in pixels])).norm(dim=1).max() < 0.1


def test_no_cracks_in_what_is_enlarged_and_nothing_shows_twice() -> None:
    picture = ramp(128, 128)
    mask = box(picture, 50, 70, 50, 70)
    moves = [((52, 60), (22, 60)), ((68, 60), (106, 60))]
    for mode in MODES:
        result = warped(pairs(moves, picture), mask, mode, grow=0, border=0)
        solid = result.moved[0] >= 0.5
        rows = [row.nonzero()[:, 0] for row in solid if row.any()][1:-1]  # the outermost are covered by half
        assert len(rows) >= 17 and all(len(row) == row[-1] - row[0] + 1 for row in rows), mode
        came = result.image[0, 60, rows[len(rows) // 2], 0]
        assert (came.diff() > 0).all(), mode


def test_hole_is_widened_but_not_into_the_moved_region_and_the_border_band_lies_on_its_edge() -> None:
    picture = noise(80, 100)
    mask, moved = box(picture, 20, 50, 10, 40), box(picture, 25, 55, 35, 65)
    points = pairs([((20, 30), (45, 35))], picture)
    gone, at = (mask * (1 - moved))[0] > 0, moved[0] > 0
    wide = warped(points, mask, grow=4, border=0)
    assert torch.equal(wide.inpaint[0] > 0, within(gone, 4) & ~at)
    band = warped(points, mask, grow=0, border=3)
    deep = torch.zeros_like(at)
    deep[28:52, 38:62] = True
    assert torch.equal(band.inpaint[0] > 0, gone | (within(at, 3) & ~deep))
    faded = warped(points, mask, grow=4, border=3, feather=5)
    hard = warped(points, mask, grow=4, border=3)
    assert torch.equal(faded.inpaint == 1, hard.inpaint == 1)
    assert 0 < faded.inpaint[hard.inpaint == 0].max() < 1
    assert not faded.inpaint[0][~within(hard.inpaint[0] > 0, 5)].any()
    assert torch.equal(faded.image, hard.image)
    untouched = (mask + wide.moved + wide.inpaint) == 0
    assert torch.equal(wide.image[untouched], picture[untouched])


def test_a_border_that_stays_in_place_is_not_painted_anew() -> None:
    picture = noise(80, 100)
    mask = box(picture, 20, 60, 20, 80)
    anchors = [((20, y), (20, y)) for y in (20, 30, 40, 50, 60)]
    result = warped(pairs([*anchors, ((76, 40), (86, 40))], picture), mask, grow=0, border=2)
    assert not result.inpaint[0, :, :22].any()
    assert result.inpaint[0, 36:44, 86:].any()


def test_the_hole_is_filled_from_around_and_neither_object_shows_in_it() -> None:
    picture = torch.full((1, 64, 96, 3), 0.5)
    picture[:, 20:40, 10:40] = torch.tensor([1.0, 0.0, 0.0])
    result = warped(pairs([((20, 30), (33, 30))], picture), box(picture, 18, 42, 8, 42), grow=3)
    filled = (result.inpaint[0] > 0) & (result.moved[0] == 0)
    torch.testing.assert_close(result.image[0][filled], torch.full((int(filled.sum()), 3), 0.5))


def test_parts_move_with_their_own_points_and_others_stay() -> None:
    picture = noise(80, 100)
    mask = box(picture, 10, 20, 10, 20) + box(picture, 50, 60, 10, 20) + box(picture, 10, 20, 70, 80)
    points = pairs([((15, 15), (35, 15)), ((15.5, 64.5), (15.5, 69.5))], picture)
    result = warped(points, mask, grow=0, border=0)
    assert torch.equal(result.image[:, 10:20, 30:40], picture[:, 10:20, 10:20])
    assert torch.equal(result.image[:, 55:65, 10:20], picture[:, 50:60, 10:20])
    assert torch.equal(result.image[:, 10:20, 70:80], picture[:, 10:20, 70:80])
    assert not result.inpaint[:, 10:20, 70:80].any() and result.moved[:, 10:20, 70:80].all()
    assert "point 2 lies 5 px beside the mask" in result.text() and "1 part of the mask without points" in result.text()


def test_where_parts_overlap_the_later_point_is_on_top() -> None:
    picture = noise(60, 100)
    mask = box(picture, 10, 30, 10, 30) + box(picture, 10, 30, 60, 80)
    moves = [((20, 20), (40, 20)), ((70, 20), (50, 20))]
    for order, source in ((moves, 60), (moves[::-1], 10)):
        result = warped(pairs(order, picture), mask)
        shift = 40 - source if source == 60 else 30 - source
        assert torch.equal(result.image[:, 12:28, 42:48], picture[:, 12:28, 42 - shift : 48 - shift])


def test_what_leaves_the_picture_is_gone() -> None:
    picture = noise(40, 60)
    mask = box(picture, 10, 20, 40, 56)
    partly = warped(pairs([((45, 15), (55, 15))], picture), mask, grow=0, border=0)
    assert torch.equal(partly.moved, box(picture, 10, 20, 50, 60)) and "62% of that area" in partly.text()
    # Two points that are on the picture, and turn a third place of the region out of it.
    corner = box(picture, 0, 10, 0, 10)
    out = warped(pairs([((60, 40), (40, 0)), ((50, 40), (50, 0))], picture), corner, grow=0, border=0)
    assert "has left the image" in out.text()
    assert torch.equal(out.inpaint, corner) and not out.moved.any()


def test_the_whole_picture_and_no_mask_are_the_same() -> None:
    picture = noise(33, 47)
    points = pairs([((10, 10), (16, 12))], picture)
    full, none = warped(points, torch.ones(1, 33, 47), grow=0, border=0), warped(points, None, grow=0)
    assert torch.equal(full.image[:, 2:, 6:], picture[:, :-2, :-6])
    assert torch.equal(full.inpaint, 1 - box(picture, 2, 33, 6, 47))
    assert "paint a mask" in full.text() and torch.equal(none.image, full.image)
    assert torch.isfinite(full.image).all() and full.image.min() >= 0 and full.image.max() <= 1


def test_points_at_their_target_change_nothing() -> None:
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warped(pairs([((12, 16), (12, 16)), ((15, 20), (15, 20))], picture), mask)
    assert torch.equal(result.image, picture) and not result.inpaint.any() and torch.equal(result.moved, mask)
    assert "nothing moves" in result.text()


def test_one_pixel_thirty_points_and_borders() -> None:
    picture = noise(41, 63)
    dot = box(picture, 20, 21, 30, 31)
    result = warped(pairs([((30.5, 20.5), (40.5, 5.5))], picture), dot, grow=0, border=0)
    assert torch.equal(result.image[0, 5, 40], picture[0, 20, 30]) and result.inpaint.sum() == 1
    for mode in MODES:
        generator = torch.Generator().manual_seed(3)
        handles = torch.rand(30, 2, generator=generator) * torch.tensor([63.0, 41.0])
        targets = (handles + torch.randn(30, 2, generator=generator)).clamp(min=0).minimum(torch.tensor([63.0, 41.0]))
        many = warped(pairs(list(zip(handles.tolist(), targets.tolist(), strict=True)), picture), None, mode)
        assert torch.isfinite(many.image).all()
        corners = warped(pairs([((0, 0), (63, 41)), ((63, 41), (20, 20))], picture), None, mode)
        assert torch.isfinite(corners.image).all() and torch.isfinite(corners.moved).all()


def test_the_type_of_the_picture_is_kept_and_inputs_stay() -> None:
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    before = picture.clone(), mask.clone()
    result: Warped = warped(pairs([((12, 16), (20, 16))], picture), mask, feather=2)
    assert torch.equal(picture, before[0]) and torch.equal(mask, before[1])
    half = warped(pairs([((12, 16), (20, 16))], picture.half()), mask.half(), feather=2)
    assert half.image.dtype == half.inpaint.dtype == half.moved.dtype == torch.float16
    torch.testing.assert_close(half.image.float(), result.image, atol=2e-3, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_it_works_where_the_picture_is(mode: Mode) -> None:
    """Under another default device, a tensor that is made without naming the picture's would not fit to it."""
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    points = pairs([((12, 16), (20, 16)), ((16, 20), (25, 22))], picture)
    expected = warped(points, mask, mode, feather=2)
    with torch.device("meta"):
        result = warped(points, mask, mode, feather=2)
    assert torch.equal(result.image, expected.image) and torch.equal(result.inpaint, expected.inpaint)


def test_errors_say_what_to_do() -> None:
    picture = noise()
    points, mask = pairs([((12, 16), (20, 16))], picture), box(picture, 10, 25, 8, 20)
    with pytest.raises(InvalidPoints, match=r"there are none. Place"):
        warped(DragPoints((), picture), mask)
    with pytest.raises(InvalidImage, match="0 everywhere"):
        warped(points, torch.zeros_like(mask))
    with pytest.raises(InvalidImage, match=r"its highest value is 0.3.*Raise the values"):
        warped(points, 0.3 * mask)
    with pytest.raises(InvalidImage, match=r"60x48 is needed. Resize"):
        warped(points, mask[:, :40])
    with pytest.raises(InvalidImage, match="got 2 masks, but one is needed"):
        warped(points, mask.repeat(2, 1, 1))
    with pytest.raises(InvalidSetting, match="grow: got -1, but 0 or more"):
        warped(points, mask, grow=-1)
    with pytest.raises(InvalidSetting, match="border: got 61, but 0 to 60"):
        warped(points, mask, border=61)
    with pytest.raises(InvalidSetting, match="mode: got 'melt'"):
        WarpSettings(mode="melt")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_object_of_a_scene_arrives_with_its_colour_and_shape(count: int) -> None:
    for index in range(count, 12, 3):
        rng = scene_rng("train", 910_000 + index)
        scene = sample_scene(rng, 1)
        thing = replace(scene.objects[0], x=50.0, y=58.0, radius=min(scene.objects[0].radius, 22.0))
        scene = replace(scene, objects=(thing,))
        picture = render(scene).movedim(0, -1)[None]
        dx, dy = rng.uniform(5, 25, 2)
        spokes = [rng.uniform(0, 6) + 2 * math.pi * k / count for k in range(count)]
        reach = 0 if count == 1 else 0.6 * thing.radius
        handles = [(thing.x + reach * math.cos(a), thing.y + reach * math.sin(a)) for a in spokes]
        moves = [((x, y), (x + dx, y + dy)) for x, y in handles]
        result = warped(pairs(moves, picture), instance_masks(scene, 4)[:1], grow=3)
        (before,), (after,) = (parse(p[0].movedim(-1, 0)).objects for p in (picture, result.image))
        assert (after.colour, after.shape) == (before.colour, before.shape)
        assert math.hypot(after.x - before.x - dx, after.y - before.y - dy) < 0.5
