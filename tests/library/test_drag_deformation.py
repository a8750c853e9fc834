"""The deformations of Warp and Inpaint: exact at their points, without folds, and the same on a picture's pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidPoints
from retrace.drag.warp.deformation import MOST_STEPS, Deformation, Mode
from retrace.drag.warp.field import displacement, sample

pytestmark = pytest.mark.rounding

MODES: tuple[Mode, ...] = get_args(Mode)


def noise(height: int = 48, width: int = 60, seed: int = 0) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def origin(deformation: Deformation, places: Sequence[tuple[float, float]]) -> Tensor:
    """Where ``places`` came from, [N, 2]."""
    at = torch.tensor(places, dtype=torch.float64)
    return at + torch.stack(deformation.origin(at[:, 0], at[:, 1]), 1)


def scattered(count: int, seed: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    handles = 20 + 160 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    noise = spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return handles, handles + torch.tensor([30.0, -12.0]) + noise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 30])
def test_every_target_comes_from_its_handle(mode: Mode, count: int) -> None:
    for seed in range(4):
        handles, targets = scattered(count, seed)
        deformation = Deformation(handles.tolist(), targets.tolist(), mode)
        torch.testing.assert_close(origin(deformation, targets.tolist()), handles, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_equal_shifts_are_one_shift_everywhere(mode: Mode) -> None:
    handles, _ = scattered(5, 0)
    deformation = Deformation(handles.tolist(), (handles + 16.25).tolist(), mode)
    dx, dy = deformation.origin(torch.tensor([0.0, 7.3, 900.0]), torch.tensor([0.0, 55.5, -4.0]))
    assert deformation.steps == 1
    assert dx.tolist() == dy.tolist() == [-16.25] * 3


@pytest.mark.parametrize("degrees", [10, 90, -135, 180])
def test_two_points_turn_the_plane_exactly(degrees: float) -> None:
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


def test_scale_enlarges_and_rigid_does_not() -> None:
    apart = [(40.0, 50.0), (60.0, 50.0)], [(30.0, 50.0), (70.0, 50.0)]
    above = [(50.0, 40.0)]
    torch.testing.assert_close(
        origin(Deformation(*apart, "scale"), above), torch.tensor([[50.0, 45.0]], dtype=torch.float64)
    )
    turned = origin(Deformation(*apart, "rigid"), above)
    torch.testing.assert_close(turned, torch.tensor([[50.0, 40.0]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_stretch_weighs_by_the_inverse_squared_distance() -> None:
    deformation = Deformation([(0.0, 0.0), (103.0, 0.0)], [(0.0, 0.0), (100.0, 0.0)], "stretch")
    assert deformation.steps == 1
    # 1/3 of the way from the anchor: weights 4 to 1.
    torch.testing.assert_close(
        origin(deformation, [(100 / 3, 0.0)]), torch.tensor([[100 / 3 + 3 / 5, 0.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", [30.0, 300.0])
def test_pulled_far_from_an_anchor_it_does_not_fold(mode: Mode, end: float) -> None:
    """One step would show parts of the line between the two twice: see the module."""
    deformation = Deformation([(0.0, 0.0), (100.0, 0.0)], [(0.0, 0.0), (end, 0.0)], mode)
    line = origin(deformation, [(x, 0.0) for x in np.linspace(0, end, 200).tolist()])
    assert line[0].abs().max() < 1e-6 and (line[-1] - torch.tensor([100.0, 0.0])).abs().max() < 1e-6
    assert (line[:, 0].diff() > 0).all()
    assert (1 if mode == "scale" else 2) <= deformation.steps <= MOST_STEPS


def test_one_step_would_fold() -> None:
    deformation = Deformation([(0.0, 0.0), (100.0, 0.0)], [(0.0, 0.0), (300.0, 0.0)], "stretch")
    deformation.places = deformation.places[[0, -1]]
    line = origin(deformation, [(x, 0.0) for x in np.linspace(0, 300, 200).tolist()])
    assert (line[:, 0].diff() < 0).any()


def test_repeated_points_count_once_and_contradictions_are_named() -> None:
    once = Deformation([(10.0, 10.0), (50.0, 20.0)], [(12.0, 10.0), (50.0, 29.0)], "rigid")
    twice = Deformation([(10.0, 10.0), (50.0, 20.0), (10.2, 10.0)], [(12.0, 10.0), (50.0, 29.0), (12.1, 10.0)], "rigid")
    torch.testing.assert_close(origin(once, [(7.0, 8.0)]), origin(twice, [(7.0, 8.0)]))
    with pytest.raises(InvalidPoints, match=r"1 and 3 have one handle at \(10.0, 10.0\) px, but two targets"):
        Deformation([(10, 10), (50, 20), (10, 10)], [(12, 10), (50, 29), (14, 10)], "rigid")
    with pytest.raises(InvalidPoints, match=r"4 and 7 have one target .* but two handles"):
        Deformation([(10, 10), (50, 20)], [(12, 10), (12, 10)], "stretch", [4, 7])


# The deformation on pixels


@pytest.mark.parametrize("mode", MODES)
def test_a_grid_guesses_within_a_small_part_of_a_pixel(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    handles, targets = scattered(6, 1, spread=10.0)
    deformation = Deformation(handles.tolist(), targets.tolist(), mode)
    exact = displacement(deformation, 3, 5, (150, 171), torch.device("cpu"))
    monkeypatch.setattr("retrace.drag.warp.field._EVALUATIONS", 1 << 14)
    guessed = displacement(deformation, 3, 5, (150, 171), torch.device("cpu"))
    assert not torch.equal(exact, guessed)
    assert (exact - guessed).norm(dim=0).max() < 0.15


def test_sampling_is_exact_at_centres_bilinear_between_and_continued_beyond() -> None:
    values = noise(5, 7)[0]
    y, x = torch.meshgrid(torch.arange(5) + 0.5, torch.arange(7) + 0.5, indexing="ij")
    assert torch.equal(sample(values, x, y), values)
    middle = sample(values, torch.tensor([2.75]), torch.tensor([1.5]))[0]
    torch.testing.assert_close(middle, 0.75 * values[1, 2] + 0.25 * values[1, 3])
    corner = sample(values, torch.tensor([-9.0, 99.0]), torch.tensor([-9.0, 99.0]))
    assert torch.equal(corner, torch.stack([values[0, 0], values[-1, -1]]))
