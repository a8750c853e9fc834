"""Warp and Inpaint: exact deformations, masks by set algebra, and a scene's object at its new place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from retrace.drag.deformation import MOST_STEPS, Deformation, Mode
from retrace.drag.field import displacement, sample
from retrace.drag.fill import fill_smoothly
from retrace.drag.points import DragPoints, InvalidPoints, PointPair
from retrace.drag.regions import around, connected_parts, distance_to, part_of_each, within
from retrace.drag.warp import Warped, warp_by_points
from retrace.errors import InvalidImage, InvalidSchedule
from retrace.pebble.parser import parse
from retrace.pebble.scenes import instance_masks, render, sample_scene, scene_rng
from retrace.poisson import membrane

MODES: tuple[Mode, ...] = get_args(Mode)
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


def box(picture: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(picture.shape[:3])
    mask[:, top:bottom, left:right] = 1
    return mask


def origin(deformation: Deformation, places: Sequence[tuple[float, float]]) -> Tensor:
    """Where ``places`` came from, [N, 2]."""
    at = torch.tensor(places, dtype=torch.float64)
    return at + torch.stack(deformation.origin(at[:, 0], at[:, 1]), 1)


def scattered(count: int, seed: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    handles = 20 + 160 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    noise = spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return handles, handles + torch.tensor([30.0, -12.0]) + noise


# Deformations


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 30])
def test_every_target_comes_from_its_handle(mode, count):
    for seed in range(4):
        handles, targets = scattered(count, seed)
        deformation = Deformation(handles.tolist(), targets.tolist(), mode)
        torch.testing.assert_close(origin(deformation, targets.tolist()), handles, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_equal_shifts_are_one_shift_everywhere(mode):
    handles, _ = scattered(5, 0)
    deformation = Deformation(handles.tolist(), (handles + 16.25).tolist(), mode)
    dx, dy = deformation.origin(torch.tensor([0.0, 7.3, 900.0]), torch.tensor([0.0, 55.5, -4.0]))
    assert deformation.steps == 1
    assert dx.tolist() == dy.tolist() == [-16.25] * 3


@pytest.mark.parametrize("degrees", [10, 90, -135, 180])
def test_two_points_turn_the_plane_exactly(degrees):
    centre, turn = complex(40, 70), complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    handles = [complex(20, 64), complex(66, 80), complex(41, 90)]
    for count in (2, 3):
        ends = [centre + turn * (h - centre) + complex(5, -3) for h in handles[:count]]
        deformation = Deformation(
            [(h.real, h.imag) for h in handles[:count]], [(e.real, e.imag) for e in ends], "rigid"
        )
        places = [(3.0, 9.0), (40.0, 70.0), (200.0, 31.5)]
        back = [(complex(*place) - complex(5, -3) - centre) / turn + centre for place in places]
        expected = torch.tensor([(b.real, b.imag) for b in back], dtype=torch.float64)
        torch.testing.assert_close(origin(deformation, places), expected, atol=1e-6, rtol=0)
        assert deformation.steps == 1


def test_scale_enlarges_and_rigid_does_not():
    apart = [(40.0, 50.0), (60.0, 50.0)], [(30.0, 50.0), (70.0, 50.0)]
    above = [(50.0, 40.0)]
    torch.testing.assert_close(
        origin(Deformation(*apart, "scale"), above), torch.tensor([[50.0, 45.0]], dtype=torch.float64)
    )
    turned = origin(Deformation(*apart, "rigid"), above)
    torch.testing.assert_close(turned, torch.tensor([[50.0, 40.0]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_stretch_weighs_by_the_inverse_squared_distance():
    deformation = Deformation([(0.0, 0.0), (103.0, 0.0)], [(0.0, 0.0), (100.0, 0.0)], "stretch")
    assert deformation.steps == 1
    # 1/3 of the way from the anchor: weights 4 to 1.
    torch.testing.assert_close(
        origin(deformation, [(100 / 3, 0.0)]), torch.tensor([[100 / 3 + 3 / 5, 0.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", [30.0, 300.0])
def test_pulled_far_from_an_anchor_it_does_not_fold(mode, end):
    """One step would show parts of the line between the two twice: see the module."""
    deformation = Deformation([(0.0, 0.0), (100.0, 0.0)], [(0.0, 0.0), (end, 0.0)], mode)
    line = origin(deformation, [(x, 0.0) for x in np.linspace(0, end, 200).tolist()])
    assert line[0].abs().max() < 1e-6 and (line[-1] - torch.tensor([100.0, 0.0])).abs().max() < 1e-6
    assert (line[:, 0].diff() > 0).all()
    assert (1 if mode == "scale" else 2) <= deformation.steps <= MOST_STEPS


def test_one_step_would_fold():
    deformation = Deformation([(0.0, 0.0), (100.0, 0.0)], [(0.0, 0.0), (300.0, 0.0)], "stretch")
    deformation.places = deformation.places[[0, -1]]
    line = origin(deformation, [(x, 0.0) for x in np.linspace(0, 300, 200).tolist()])
    assert (line[:, 0].diff() < 0).any()


def test_repeated_points_count_once_and_contradictions_are_named():
    once = Deformation([(10.0, 10.0), (50.0, 20.0)], [(12.0, 10.0), (50.0, 29.0)], "rigid")
    twice = Deformation([(10.0, 10.0), (50.0, 20.0), (10.2, 10.0)], [(12.0, 10.0), (50.0, 29.0), (12.1, 10.0)], "rigid")
    torch.testing.assert_close(origin(once, [(7.0, 8.0)]), origin(twice, [(7.0, 8.0)]))
    with pytest.raises(InvalidPoints, match=r"1 and 3 have one handle at \(10.0, 10.0\) px, but two targets"):
        Deformation([(10, 10), (50, 20), (10, 10)], [(12, 10), (50, 29), (14, 10)], "rigid")
    with pytest.raises(InvalidPoints, match=r"4 and 7 have one target .* but two handles"):
        Deformation([(10, 10), (50, 20)], [(12, 10), (12, 10)], "stretch", [4, 7])


# The deformation on pixels


@pytest.mark.parametrize("mode", MODES)
def test_a_grid_guesses_within_a_small_part_of_a_pixel(mode, monkeypatch):
    handles, targets = scattered(6, 1, spread=10.0)
    deformation = Deformation(handles.tolist(), targets.tolist(), mode)
    exact = displacement(deformation, 3, 5, (150, 171), torch.device("cpu"))
    monkeypatch.setattr("retrace.drag.field._EVALUATIONS", 1 << 14)
    guessed = displacement(deformation, 3, 5, (150, 171), torch.device("cpu"))
    assert not torch.equal(exact, guessed)
    assert (exact - guessed).norm(dim=0).max() < 0.15


def test_sampling_is_exact_at_centres_bilinear_between_and_continued_beyond():
    values = noise(5, 7)[0]
    y, x = torch.meshgrid(torch.arange(5) + 0.5, torch.arange(7) + 0.5, indexing="ij")
    assert torch.equal(sample(values, x, y), values)
    middle = sample(values, torch.tensor([2.75]), torch.tensor([1.5]))[0]
    torch.testing.assert_close(middle, 0.75 * values[1, 2] + 0.25 * values[1, 3])
    corner = sample(values, torch.tensor([-9.0, 99.0]), torch.tensor([-9.0, 99.0]))
    assert torch.equal(corner, torch.stack([values[0, 0], values[-1, -1]]))


# Regions and filling


def test_distances_are_those_to_the_nearest_pixel():
    selected = torch.zeros(30, 41, dtype=torch.bool)
    selected[[0, 14, 15, 29], [3, 20, 20, 40]] = True
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(41), indexing="ij")
    places = selected.nonzero()
    true = ((rows[..., None] - places[:, 0]) ** 2 + (columns[..., None] - places[:, 1]) ** 2).amin(-1).double().sqrt()
    for reach in (1, 6.5, 9, 512):
        assert torch.equal(distance_to(selected, reach), torch.where(true <= reach, true, math.inf).float())
    assert torch.equal(within(selected, 3), true <= 3)
    assert torch.equal(within(selected, 0), selected)
    assert not within(torch.zeros_like(selected), 9).any()
    assert selected[around(selected, 0)].shape == (30, 38)


def test_parts_touch_at_corners_and_a_place_belongs_to_the_nearest():
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[1, 1] = mask[2, 2] = mask[6, 8] = True
    labels, count = connected_parts(mask)
    assert count == 2 and labels[1, 1] == labels[2, 2] == 1
    assert part_of_each(labels, [(1.2, 1.9), (8.5, 2.5), (12.0, 9.0)]) == [
        (1, 0.0),
        (2, 4.0),
        (2, pytest.approx(math.hypot(3.5, 2.5))),
    ]


def test_filling_is_nearly_the_membrane_and_exact_on_a_plain_ground():
    picture = ramp(60, 81)[0] * 0.7 + 0.1
    region = (instance_masks(sample_scene(scene_rng("train", 1), 1), 3)[0] > 0)[:60, 20:101]
    smooth = membrane(picture.double().movedim(-1, 0), region).movedim(0, -1)[region]
    assert (fill_smoothly(picture, region, region) - smooth).abs().max() < 0.02
    plain = torch.full((60, 81, 3), 0.4)
    plain[region] = 1
    torch.testing.assert_close(fill_smoothly(plain, region, region), torch.full((int(region.sum()), 3), 0.4))
    everything = torch.ones(60, 81, dtype=torch.bool)
    torch.testing.assert_close(fill_smoothly(plain, everything, everything)[0], plain.mean((0, 1)))


# The whole


@pytest.mark.parametrize("mode", MODES)
def test_a_shift_by_whole_pixels_copies_and_its_masks_are_sets(mode):
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warp_by_points(pairs([((12, 16), (21, 19))], picture), mask, mode, grow=0, border=0)
    assert torch.equal(result.image[:, 13:28, 17:29], picture[:, 10:25, 8:20])
    moved = box(picture, 13, 28, 17, 29)
    assert torch.equal(result.moved, moved)
    assert torch.equal(result.inpaint, mask * (1 - moved))
    untouched = (mask + moved) == 0
    assert torch.equal(result.image[untouched], picture[untouched])
    assert "180 px moved, 100%" in result.report


def test_a_shift_by_part_of_a_pixel_is_bilinear():
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warp_by_points(pairs([((12, 16), (15.25, 16))], picture), mask)
    inside = result.image[:, 14:20, 14:20]
    torch.testing.assert_close(inside, 0.75 * picture[:, 14:20, 11:17] + 0.25 * picture[:, 14:20, 10:16])
    assert result.moved[0, 16, 11] == pytest.approx(0.75) and result.moved[0, 16, 23] == pytest.approx(0.25)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(128, 128), (97, 211)])
def test_every_handle_lands_on_its_target_in_the_picture(mode, size):
    height, width = size
    picture = ramp(*size)
    moves = [
        ((0.3, 0.4), (0.42, 0.5)),
        ((0.6, 0.45), (0.71, 0.4)),
        ((0.5, 0.7), (0.5, 0.7)),
        ((0.4, 0.6), (0.42, 0.66)),
    ]
    pixels = [((a * width, b * height), (c * width, d * height)) for (a, b), (c, d) in moves]
    result = warp_by_points(
        pairs(pixels, picture), box(picture, height // 4, height - 20, width // 5, width - 20), mode
    )
    at = torch.tensor([target for _, target in pixels])
    came = sample(result.image[0], at[:, 0], at[:, 1])[:, :2] * torch.tensor([width, height])
    assert (came - torch.tensor([handle for handle, _ in pixels])).norm(dim=1).max() < 0.1


def test_no_cracks_in_what_is_enlarged_and_nothing_shows_twice():
    picture = ramp(128, 128)
    mask = box(picture, 50, 70, 50, 70)
    moves = [((52, 60), (22, 60)), ((68, 60), (106, 60))]
    for mode in MODES:
        result = warp_by_points(pairs(moves, picture), mask, mode, grow=0, border=0)
        solid = result.moved[0] >= 0.5
        rows = [row.nonzero()[:, 0] for row in solid if row.any()][1:-1]  # the outermost are covered by half
        assert len(rows) >= 17 and all(len(row) == row[-1] - row[0] + 1 for row in rows), mode
        came = result.image[0, 60, rows[len(rows) // 2], 0]
        assert (came.diff() > 0).all(), mode


def test_hole_is_widened_but_not_into_the_moved_region_and_the_border_band_lies_on_its_edge():
    picture = noise(80, 100)
    mask, moved = box(picture, 20, 50, 10, 40), box(picture, 25, 55, 35, 65)
    points = pairs([((20, 30), (45, 35))], picture)
    gone, at = (mask * (1 - moved))[0] > 0, moved[0] > 0
    wide = warp_by_points(points, mask, grow=4, border=0)
    assert torch.equal(wide.inpaint[0] > 0, within(gone, 4) & ~at)
    band = warp_by_points(points, mask, grow=0, border=3)
    deep = torch.zeros_like(at)
    deep[28:52, 38:62] = True
    assert torch.equal(band.inpaint[0] > 0, gone | (within(at, 3) & ~deep))
    faded = warp_by_points(points, mask, grow=4, border=3, feather=5)
    hard = warp_by_points(points, mask, grow=4, border=3)
    assert torch.equal(faded.inpaint == 1, hard.inpaint == 1)
    assert 0 < faded.inpaint[hard.inpaint == 0].max() < 1
    assert not faded.inpaint[0][~within(hard.inpaint[0] > 0, 5)].any()
    assert torch.equal(faded.image, hard.image)
    untouched = (mask + wide.moved + wide.inpaint) == 0
    assert torch.equal(wide.image[untouched], picture[untouched])


def test_a_border_that_stays_in_place_is_not_painted_anew():
    picture = noise(80, 100)
    mask = box(picture, 20, 60, 20, 80)
    anchors = [((20, y), (20, y)) for y in (20, 30, 40, 50, 60)]
    result = warp_by_points(pairs([*anchors, ((76, 40), (86, 40))], picture), mask, grow=0, border=2)
    assert not result.inpaint[0, :, :22].any()
    assert result.inpaint[0, 36:44, 86:].any()


def test_the_hole_is_filled_from_around_and_neither_object_shows_in_it():
    picture = torch.full((1, 64, 96, 3), 0.5)
    picture[:, 20:40, 10:40] = torch.tensor([1.0, 0.0, 0.0])
    result = warp_by_points(pairs([((20, 30), (33, 30))], picture), box(picture, 18, 42, 8, 42), grow=3)
    filled = (result.inpaint[0] > 0) & (result.moved[0] == 0)
    torch.testing.assert_close(result.image[0][filled], torch.full((int(filled.sum()), 3), 0.5))


def test_parts_move_with_their_own_points_and_others_stay():
    picture = noise(80, 100)
    mask = box(picture, 10, 20, 10, 20) + box(picture, 50, 60, 10, 20) + box(picture, 10, 20, 70, 80)
    points = pairs([((15, 15), (35, 15)), ((15.5, 64.5), (15.5, 69.5))], picture)
    result = warp_by_points(points, mask, grow=0, border=0)
    assert torch.equal(result.image[:, 10:20, 30:40], picture[:, 10:20, 10:20])
    assert torch.equal(result.image[:, 55:65, 10:20], picture[:, 50:60, 10:20])
    assert torch.equal(result.image[:, 10:20, 70:80], picture[:, 10:20, 70:80])
    assert not result.inpaint[:, 10:20, 70:80].any() and result.moved[:, 10:20, 70:80].all()
    assert "point 2 lies 5 px beside the mask" in result.report and "1 part of the mask without points" in result.report


def test_where_parts_overlap_the_later_point_is_on_top():
    picture = noise(60, 100)
    mask = box(picture, 10, 30, 10, 30) + box(picture, 10, 30, 60, 80)
    moves = [((20, 20), (40, 20)), ((70, 20), (50, 20))]
    for order, source in ((moves, 60), (moves[::-1], 10)):
        result = warp_by_points(pairs(order, picture), mask)
        shift = 40 - source if source == 60 else 30 - source
        assert torch.equal(result.image[:, 12:28, 42:48], picture[:, 12:28, 42 - shift : 48 - shift])


def test_what_leaves_the_picture_is_gone():
    picture = noise(40, 60)
    mask = box(picture, 10, 20, 40, 56)
    partly = warp_by_points(pairs([((45, 15), (55, 15))], picture), mask, grow=0, border=0)
    assert torch.equal(partly.moved, box(picture, 10, 20, 50, 60)) and "62% of that area" in partly.report
    # Two points that are on the picture, and turn a third place of the region out of it.
    corner = box(picture, 0, 10, 0, 10)
    out = warp_by_points(pairs([((60, 40), (40, 0)), ((50, 40), (50, 0))], picture), corner, grow=0, border=0)
    assert "has left the picture" in out.report
    assert torch.equal(out.inpaint, corner) and not out.moved.any()


def test_the_whole_picture_and_no_mask_are_the_same():
    picture = noise(33, 47)
    points = pairs([((10, 10), (16, 12))], picture)
    full, none = warp_by_points(points, torch.ones(1, 33, 47), grow=0, border=0), warp_by_points(points, None, grow=0)
    assert torch.equal(full.image[:, 2:, 6:], picture[:, :-2, :-6])
    assert torch.equal(full.inpaint, 1 - box(picture, 2, 33, 6, 47))
    assert "paint a mask" in full.report and torch.equal(none.image, full.image)
    assert torch.isfinite(full.image).all() and full.image.min() >= 0 and full.image.max() <= 1


def test_points_at_their_target_change_nothing():
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    result = warp_by_points(pairs([((12, 16), (12, 16)), ((15, 20), (15, 20))], picture), mask)
    assert torch.equal(result.image, picture) and not result.inpaint.any() and torch.equal(result.moved, mask)
    assert "nothing moves" in result.report


def test_one_pixel_thirty_points_and_borders():
    picture = noise(41, 63)
    dot = box(picture, 20, 21, 30, 31)
    result = warp_by_points(pairs([((30.5, 20.5), (40.5, 5.5))], picture), dot, grow=0, border=0)
    assert torch.equal(result.image[0, 5, 40], picture[0, 20, 30]) and result.inpaint.sum() == 1
    for mode in MODES:
        generator = torch.Generator().manual_seed(3)
        handles = torch.rand(30, 2, generator=generator) * torch.tensor([63.0, 41.0])
        targets = (handles + torch.randn(30, 2, generator=generator)).clamp(min=0).minimum(torch.tensor([63.0, 41.0]))
        many = warp_by_points(pairs(list(zip(handles.tolist(), targets.tolist(), strict=True)), picture), None, mode)
        assert torch.isfinite(many.image).all()
        corners = warp_by_points(pairs([((0, 0), (63, 41)), ((63, 41), (20, 20))], picture), None, mode)
        assert torch.isfinite(corners.image).all() and torch.isfinite(corners.moved).all()


def test_the_type_of_the_picture_is_kept_and_inputs_stay():
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    before = picture.clone(), mask.clone()
    result: Warped = warp_by_points(pairs([((12, 16), (20, 16))], picture), mask, feather=2)
    assert torch.equal(picture, before[0]) and torch.equal(mask, before[1])
    half = warp_by_points(pairs([((12, 16), (20, 16))], picture.half()), mask.half(), feather=2)
    assert half.image.dtype == half.inpaint.dtype == half.moved.dtype == torch.float16
    torch.testing.assert_close(half.image.float(), result.image, atol=2e-3, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_it_works_where_the_picture_is(mode):
    """Under another default device, a tensor that is made without naming the picture's would not fit to it."""
    picture = noise()
    mask = box(picture, 10, 25, 8, 20)
    points = pairs([((12, 16), (20, 16)), ((16, 20), (25, 22))], picture)
    expected = warp_by_points(points, mask, mode, feather=2)
    with torch.device("meta"):
        result = warp_by_points(points, mask, mode, feather=2)
    assert torch.equal(result.image, expected.image) and torch.equal(result.inpaint, expected.inpaint)


def test_errors_say_what_to_do():
    picture = noise()
    points, mask = pairs([((12, 16), (20, 16))], picture), box(picture, 10, 25, 8, 20)
    with pytest.raises(InvalidPoints, match=r"there are none. Place"):
        warp_by_points(DragPoints((), picture), mask)
    with pytest.raises(InvalidImage, match="0 everywhere"):
        warp_by_points(points, torch.zeros_like(mask))
    with pytest.raises(InvalidImage, match=r"its highest value is 0.3.*Threshold Mask"):
        warp_by_points(points, 0.3 * mask)
    with pytest.raises(InvalidImage, match=r"60x48 is needed. Resize"):
        warp_by_points(points, mask[:, :40])
    with pytest.raises(InvalidImage, match="got 2 masks, but one is needed"):
        warp_by_points(points, mask.repeat(2, 1, 1))
    with pytest.raises(InvalidSchedule, match="grow: got -1, but 0 to"):
        warp_by_points(points, mask, grow=-1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_object_of_a_scene_arrives_with_its_colour_and_shape(count):
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
        result = warp_by_points(pairs(moves, picture), instance_masks(scene, 4)[:1], grow=3)
        (before,), (after,) = (parse(p[0].movedim(-1, 0)).objects for p in (picture, result.image))
        assert (after.colour, after.shape) == (before.colour, before.shape)
        assert math.hypot(after.x - before.x - dx, after.y - before.y - dy) < 0.5
