"""Drag Points' text becomes pairs, strokes and an area, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from retrace.core.errors import InvalidImage, InvalidPoints
from retrace.drag.area import movable_area, paint_strokes
from retrace.drag.points import MOST_POINTS, DragPoints, PointPair, Stroke, parse_points

PAIR = PointPair((0.25, 0.5), (0.75, 0.125))


@pytest.mark.parametrize(
    "text",
    [
        '{"points": [{"handle": [0.25, 0.5], "target": [0.75, 0.125]}]}',
        '[{"handle": [0.25, 0.5], "target": [0.75, 0.125]}]',
        "[[[0.25, 0.5], [0.75, 0.125]]]",
        "[[0.25, 0.5, 0.75, 0.125]]",
    ],
)
def test_every_way_to_write_a_pair_means_the_same(text: str) -> None:
    assert parse_points(text) == ((PAIR,), ())


@pytest.mark.parametrize("text", ["", "  \n", "{}", "[]", '{"points": [], "strokes": []}'])
def test_nothing_is_no_points(text: str) -> None:
    assert parse_points(text) == ((), ())


def test_strokes_keep_their_order_and_kind() -> None:
    strokes = [
        {"points": [[0, 0], [1, 1]], "radius": 0.1},
        {"points": [[0.5, 0.5]], "radius": 1, "erase": True},
    ]
    _, read = parse_points(json.dumps({"strokes": strokes}))
    assert read == (Stroke(((0.0, 0.0), (1.0, 1.0)), 0.1), Stroke(((0.5, 0.5),), 1.0, True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", ["not valid JSON", "should look like"]),
        ("[" * 100_000, ["not valid JSON"]),
        ("3", ["it is 3", "should look like"]),
        ('{"points": 5}', ["must be lists"]),
        ('{"points": null}', ["must be lists"]),
        ('[{"handle": [0.5, 0.5]}]', ["pair 1", 'no "target"']),
        ('[{"handle": [0.5, 0.5], "target": [0.5]}]', ["pair 1, target", "two numbers"]),
        ('[[0, 0, 1, 1], [[0.5, "x"], [0, 0]]]', ["pair 2, handle", "two numbers"]),
        ("[[0.5, true, 0, 0]]", ["two numbers"]),
        ("[[0.5, NaN, 0, 0]]", ["two numbers"]),
        ("[[120, 80, 200, 80]]", ["between 0 and 1", "divide pixels"]),
        ("[[0.5, -Infinity, 0, 0]]", ["between 0 and 1"]),
        (f"[[0.5, 1{'0' * 400}, 0, 0]]", ["between 0 and 1"]),
        ("[[0.5, 0.5]]", ["pair 1, handle", "it is 0.5"]),
        ("[[0.5, 0.5, 0.5]]", ["pair 1 is not a pair of points"]),
        (
            json.dumps([[0, 0, 1, 1]] * (MOST_POINTS + 1)),
            [f"{MOST_POINTS + 1} pairs are too many", f"limit is {MOST_POINTS}"],
        ),
        ('{"strokes": [{"points": [], "radius": 0.1}]}', ["stroke 1 has no points", "should look like"]),
        (
            '{"strokes": [{"points": [[0, 0]], "radius": 0}]}',
            ["stroke 1", "fraction of the width, 0 to 1, but it is 0"],
        ),
        ('{"strokes": [{"points": [[0, 2]], "radius": 0.1}]}', ["stroke 1, point 1", "between 0 and 1"]),
    ],
)
def test_what_is_wrong_is_said(text: str, words: list[str]) -> None:
    with pytest.raises(InvalidPoints) as caught:
        parse_points(text)
    for word in words:
        assert word in str(caught.value)


def test_something_else_than_text_is_named() -> None:
    with pytest.raises(InvalidPoints, match=r"got a dict .* text is needed"):
        parse_points({"points": []})  # type: ignore[arg-type]


def test_points_on_a_grid_are_row_and_column_rounded_and_never_beyond_the_last_cell() -> None:
    corners = DragPoints((PointPair((0.0, 0.0), (1.0, 1.0)), PAIR), torch.zeros(1, 30, 60, 3))
    assert corners.size == (30, 60)
    handles, targets = corners.on_grid(30, 60)
    assert handles.tolist() == [[0, 0], [15, 15]]
    assert targets.tolist() == [[29, 59], [4, 45]]  # 0.125 * 30 = 3.75
    assert all(value.shape == (0, 2) for value in DragPoints((), corners.picture).on_grid(8, 8))


def test_a_dab_is_a_round_disc_on_a_picture_that_is_not_square() -> None:
    height, width, radius = 40, 80, 10.0
    (mask,) = paint_strokes([Stroke(((0.5, 0.5),), radius / width)], height, width)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    distance = ((rows - height / 2) ** 2 + (columns - width / 2) ** 2).sqrt()
    assert (mask[distance < radius - 1] == 1).all() and (mask[distance > radius + 1] == 0).all()
    assert mask.sum().item() == pytest.approx(math.pi * radius**2, rel=0.03)


def test_a_stroke_is_a_band_and_the_eraser_takes_it_away() -> None:
    path = ((0.25, 0.5), (0.75, 0.5))
    painted = paint_strokes([Stroke(path, 0.1)], 50, 100)
    assert (painted[0, 16:34, 25:75] == 1).all() and painted[0, :14].max() == 0
    assert paint_strokes([Stroke(path, 0.1), Stroke(path, 0.12, erase=True)], 50, 100).max() == 0
    again = paint_strokes([Stroke(path, 0.1), Stroke(path, 0.12, erase=True), Stroke(path, 0.1)], 50, 100)
    torch.testing.assert_close(again, painted)


def test_what_no_stroke_touches_keeps_every_bit() -> None:
    below = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    painted = paint_strokes([Stroke(((0.25, 0.25),), 0.1)], 32, 32, below)
    assert torch.equal(painted[0, 16:], below[0, 16:])
    assert painted[0, 8, 8] == 1 and painted.min() >= 0 and painted.max() <= 1
    assert torch.equal(paint_strokes([], 32, 32, below), below)


def test_a_large_picture_is_painted_less_fine_instead_of_filling_the_memory() -> None:
    mask = paint_strokes([Stroke(((0.5, 0.5),), 0.1)], 4000, 6000)
    assert mask.shape == (1, 4000, 6000) and mask.sum().item() == pytest.approx(math.pi * 600**2, rel=0.01)


def test_the_area_is_everything_unless_something_was_painted() -> None:
    empty = torch.zeros(1, 64, 64)  # what Load Image gives without transparency
    for mask in (None, empty):
        assert torch.equal(movable_area((), 20, 30, mask), torch.ones(1, 20, 30))
        dab = movable_area([Stroke(((0.5, 0.5),), 0.1)], 20, 30, mask)
        assert dab[0, 10, 15] == 1 and dab[0, 0, 0] == 0
        hole = movable_area([Stroke(((0.5, 0.5),), 0.1, erase=True)], 20, 30, mask)
        torch.testing.assert_close(hole, 1 - dab)


def test_the_area_is_the_mask_with_the_strokes_on_it() -> None:
    mask = torch.zeros(1, 20, 30)
    mask[:, :10] = 0.7
    assert torch.equal(movable_area((), 20, 30, mask), mask)
    united = movable_area([Stroke(((0.5, 1.0),), 0.1), Stroke(((0.0, 0.0),), 0.2, erase=True)], 20, 30, mask)
    assert united[0, 19, 15] == 1 and united[0, 0, 0] == 0 and united[0, 5, 20] == mask[0, 5, 20]


def test_a_mask_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InvalidImage, match="30x20 is needed"):
        movable_area((), 20, 30, torch.ones(1, 64, 64))
    with pytest.raises(InvalidImage, match="one mask for one image"):
        movable_area((), 20, 30, torch.ones(2, 20, 30))
    with pytest.raises(InvalidPoints, match="all of it was erased"):
        movable_area([Stroke(((0.5, 0.5),), 1.0, erase=True)], 20, 30)
