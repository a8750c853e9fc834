"""The picture of the points' ways: what is where, in which colour, and at every size."""

from __future__ import annotations

import pytest
import torch

from retrace.core.errors import InvalidImage, RetraceError
from retrace.pictures.drag_paths import HANDLE, TARGET, WAY, draw_paths

WAYS = [[(0.2, 0.5), (0.3, 0.5), (0.5, 0.5)], [(0.8, 0.2)]]
TARGETS = [(0.7, 0.5), (0.8, 0.9)]


def grey(height: int = 400, width: int = 600) -> torch.Tensor:
    return torch.full((1, height, width, 3), 0.5)


def at(picture: torch.Tensor, x: float, y: float) -> torch.Tensor:
    return picture[0, int(y * picture.shape[1]), int(x * picture.shape[2])]


def near(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour) / 255


@pytest.mark.parametrize("size", [(400, 600), (900, 500), (128, 128), (64, 200)])
def test_handles_targets_and_ways_have_their_colours(size: tuple[int, int]) -> None:
    picture = grey(*size)
    drawn = draw_paths(picture, WAYS, TARGETS)
    assert drawn.shape[1] % size[0] == 0 and drawn.shape[1] // size[0] == drawn.shape[2] // size[1]
    for place, colour in (
        ((0.2, 0.5), HANDLE),
        ((0.8, 0.2), HANDLE),
        ((0.7, 0.5), TARGET),
        ((0.8, 0.9), TARGET),
        ((0.4, 0.5), WAY),
        ((0.8, 0.6), TARGET),  # the rest of the way, still to go
    ):
        assert (at(drawn, *place) - near(colour)).abs().max() < 0.25, place
    assert torch.equal(at(drawn, 0.1, 0.1), picture[0, 0, 0])
    assert torch.equal(picture, grey(*size))


def test_a_large_picture_keeps_its_size_and_most_of_its_pixels() -> None:
    picture = torch.rand(1, 500, 700, 3, generator=torch.Generator().manual_seed(0))
    drawn = draw_paths(picture, WAYS, TARGETS)
    assert drawn.shape == picture.shape
    changed = (drawn != picture).any(-1).float().mean()
    assert 0 < changed < 0.05


def test_the_number_of_a_point_is_written_beside_it() -> None:
    one, two = (draw_paths(grey(), [[(0.5, 0.5)]] * count) for count in (1, 2))
    around = (slice(None), slice(140, 260), slice(240, 360))
    assert (one[around] == 1).all(-1).any()  # white ink
    assert not torch.equal(one, two)


def test_outside_of_the_mask_is_dimmed() -> None:
    mask = torch.zeros(1, 400, 600)
    mask[:, :, :300] = 1
    drawn = draw_paths(grey(), [[(0.2, 0.5)]], mask=mask)
    assert at(drawn, 0.45, 0.1)[0] == 0.5
    assert 0.1 < at(drawn, 0.9, 0.1)[0] < 0.4


def test_points_on_the_border_thirty_points_and_none() -> None:
    corners = [[(0.0, 0.0), (1.0, 1.0)], [(1.0, 0.0)], [(0.0, 1.0)], [(1.0, 1.0)]]
    drawn = draw_paths(grey(), corners)
    assert (drawn[0, 0, 0] - near(HANDLE)).abs().max() < 0.25
    many = draw_paths(grey(), [[(i / 30, 0.5), (i / 30, 0.6)] for i in range(30)], [(i / 30, 0.8) for i in range(30)])
    assert torch.isfinite(many).all() and many.min() >= 0 and many.max() <= 1
    assert torch.equal(draw_paths(grey(), []), grey())


def test_errors() -> None:
    with pytest.raises(RetraceError, match="2 paths and 1 targets"):
        draw_paths(grey(), WAYS, TARGETS[:1])
    with pytest.raises(RetraceError, match="one of them has no place"):
        draw_paths(grey(), [[]])
    with pytest.raises(InvalidImage, match="600x400 is needed"):
        draw_paths(grey(), WAYS, mask=torch.ones(1, 64, 64))
