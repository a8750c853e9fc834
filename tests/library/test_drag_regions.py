"""The sets of pixels behind Warp and Inpaint: distances, connected parts, and the filling of a hole from around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrace.blending.fill import fill_smoothly
from retrace.blending.poisson import membrane
from retrace.masks.regions import around, connected_parts, distance_to, part_of_each, within
from retrace.models.pebble.scenes import instance_masks, sample_scene, scene_rng


def ramp(height: int, width: int) -> Tensor:
    """A picture whose red is x and whose green is y: it says where each of its pixels came from."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)], -1)[
        None
    ]


def test_distances_are_those_to_the_nearest_pixel() -> None:
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


def test_parts_touch_at_corners_and_a_place_belongs_to_the_nearest() -> None:
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[1, 1] = mask[2, 2] = mask[6, 8] = True
    labels, count = connected_parts(mask)
    assert count == 2 and labels[1, 1] == labels[2, 2] == 1
    assert part_of_each(labels, [(1.2, 1.9), (8.5, 2.5), (12.0, 9.0)]) == [
        (1, 0.0),
        (2, 4.0),
        (2, pytest.approx(math.hypot(3.5, 2.5))),
    ]


def test_filling_is_nearly_the_membrane_and_exact_on_a_plain_ground() -> None:
    picture = ramp(60, 81)[0] * 0.7 + 0.1
    region = (instance_masks(sample_scene(scene_rng("train", 1), 1), 3)[0] > 0)[:60, 20:101]
    smooth = membrane(picture.double().movedim(-1, 0), region).movedim(0, -1)[region]
    assert (fill_smoothly(picture, region, region) - smooth).abs().max() < 0.02
    plain = torch.full((60, 81, 3), 0.4)
    plain[region] = 1
    torch.testing.assert_close(fill_smoothly(plain, region, region), torch.full((int(region.sum()), 3), 0.4))
    everything = torch.ones(60, 81, dtype=torch.bool)
    torch.testing.assert_close(fill_smoothly(plain, everything, everything)[0], plain.mean((0, 1)))
