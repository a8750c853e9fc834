"""Motion supervision and point tracking against the formulas written out on resized maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retrace.drag.latent.motion import FeatureGrid, arrived, motion_loss, patch_sum, square, track

pytestmark = pytest.mark.rounding


@pytest.fixture
def features() -> Tensor:
    return torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(1))


def resized(features: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(features[None], (height, width), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [(32, 48), (30, 50), (8, 12), (4, 6)])
def test_the_grid_holds_what_resizing_the_whole_map_gives(features: Tensor, size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    seen = FeatureGrid(features, *size).at(torch.stack((rows, columns), -1))
    torch.testing.assert_close(seen.movedim(-1, 0), resized(features, *size))


def test_between_whole_positions_it_is_linear(features: Tensor) -> None:
    whole = resized(features, 32, 48)
    seen = FeatureGrid(features, 32, 48).between(torch.tensor([[10.25, 7.5]]))[0]
    upper = whole[:, 10, 7] * 0.5 + whole[:, 10, 8] * 0.5
    lower = whole[:, 11, 7] * 0.5 + whole[:, 11, 8] * 0.5
    torch.testing.assert_close(seen, upper * 0.75 + lower * 0.25)


def test_positions_beyond_the_border_read_the_border(features: Tensor) -> None:
    grid = FeatureGrid(features, 32, 48)
    outside, border = torch.tensor([[-3.0, 50.0], [40.5, -0.5]]), torch.tensor([[0.0, 47.0], [31.0, 0.0]])
    torch.testing.assert_close(grid.between(outside), grid.at(border))
    assert grid.inside(torch.tensor([[0.0, 0.0], [31.0, 47.0], [32.0, 0.0], [0.0, -1.0]])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_a_square_is_in_reading_order() -> None:
    assert square(1).tolist() == [[r, c] for r in (-1.0, 0.0, 1.0) for c in (-1.0, 0.0, 1.0)]


def test_the_loss_is_that_of_the_paper(features: Tensor) -> None:
    """Eq. 3 with whole patches cut from the resized map, as the reference has it."""
    handles, targets = torch.tensor([[10.0, 9.0], [20.0, 30.0]]), torch.tensor([[16.0, 17.0], [20.0, 31.0]])
    whole = resized(features, 32, 48)
    direction = (targets[0] - handles[0]) / (targets[0] - handles[0]).norm()
    expected = 0.0
    for r in (9, 10, 11):
        for c in (8, 9, 10):
            y, x = r + float(direction[0]), c + float(direction[1])
            dy, dx = y - int(y), x - int(x)
            moved = (
                whole[:, int(y), int(x)] * (1 - dy) * (1 - dx)
                + whole[:, int(y), int(x) + 1] * (1 - dy) * dx
                + whole[:, int(y) + 1, int(x)] * dy * (1 - dx)
                + whole[:, int(y) + 1, int(x) + 1] * dy * dx
            )
            expected += float((whole[:, r, c] - moved).abs().mean())
    # The second point is nearer than the stop radius, so only the first one counts.
    loss = motion_loss(FeatureGrid(features, 32, 48), handles, targets, 1, 2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_flows_through_the_moved_patch_only(features: Tensor) -> None:
    features = features.requires_grad_()
    handle, target = torch.tensor([[16.0, 4.0]]), torch.tensor([[16.0, 44.0]])
    motion_loss(FeatureGrid(features, 32, 48), handle, target, 0, 2.0, step=20.0).backward()
    assert features.grad is not None
    touched = features.grad.abs().sum(0) > 0
    assert touched[:, :4].sum() == 0  # around the handle, at column 4 of 48 = 1 of 12
    assert touched[:, 5:8].sum() > 0  # around where it goes, column 24 of 48 = 6 of 12


@pytest.mark.parametrize("handle", [(0.0, 20.0), (31.0, 20.0), (5.0, 0.0), (5.0, 47.0), (0.0, 0.0), (31.0, 47.0)])
@pytest.mark.parametrize("target", [(0.0, 0.0), (31.0, 47.0), (15.0, 20.0)])
def test_on_the_border_it_is_finite_and_has_a_gradient(
    features: Tensor, handle: tuple[float, float], target: tuple[float, float]
) -> None:
    features = features.requires_grad_()
    loss = motion_loss(FeatureGrid(features, 32, 48), torch.tensor([handle]), torch.tensor([target]), 1, 2.0)
    if handle == target:
        assert float(loss.detach()) == 0
        return
    loss.backward()
    assert torch.isfinite(loss) and features.grad is not None and torch.isfinite(features.grad).all()


def test_pixels_outside_are_made_up_for_by_the_others() -> None:
    difference = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]])
    inside = torch.tensor([[True, True, False], [True, True, True]])
    assert float(patch_sum(difference, inside, torch.tensor([True, False]))) == 6.0


def test_tracking_finds_what_was_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, 32, 32, generator=generator)
    moved = torch.roll(first, (2, -3), (1, 2))
    handles = torch.tensor([[10.0, 12.0], [20.0, 20.0]])
    templates = FeatureGrid(first, 32, 32).at(handles)
    found = track(FeatureGrid(moved, 32, 32), templates, handles, 3)
    assert found.tolist() == [[12.0, 9.0], [22.0, 17.0]]


def test_tracking_stays_within_its_radius_and_the_picture() -> None:
    grid = FeatureGrid(torch.arange(256.0).view(1, 16, 16), 16, 16)
    corner = torch.tensor([[0.0, 0.0], [15.0, 15.0]])
    # The templates are at the other end of the picture: the nearest place within reach wins.
    found = track(grid, torch.tensor([[255.0], [0.0]]), corner, 3)
    assert found.tolist() == [[3.0, 3.0], [12.0, 12.0]]


def test_among_equals_the_first_in_reading_order_wins_and_a_lost_point_stays() -> None:
    flat = FeatureGrid(torch.zeros(2, 16, 16), 16, 16)
    handles = torch.tensor([[8.0, 8.0]])
    assert track(flat, torch.zeros(1, 2), handles, 2).tolist() == [[6.0, 6.0]]
    broken = FeatureGrid(torch.full((2, 16, 16), torch.nan), 16, 16)
    assert track(broken, torch.zeros(1, 2), handles, 2).tolist() == [[8.0, 8.0]]


def test_arrived_means_nearer_than_the_radius() -> None:
    handles, targets = torch.zeros(3, 2), torch.tensor([[0.0, 1.9], [0.0, 2.0], [3.0, 0.0]])
    assert arrived(handles, targets, 2.0).tolist() == [True, False, False]
