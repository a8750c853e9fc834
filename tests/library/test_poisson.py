"""Poisson blending against what the equation says."""

from __future__ import annotations

import pytest
import torch

from retrace.blending.poisson import membrane, poisson_blend
from retrace.core.errors import InvalidImage

pytestmark = pytest.mark.rounding


def pictures(batch: int = 1, height: int = 40, width: int = 36) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = 0.4 + 0.2 * torch.rand(batch, height, width, 3, generator=generator)
    edited = 0.4 + 0.2 * torch.rand(batch, height, width, 3, generator=generator)
    mask = torch.zeros(batch, height, width)
    mask[:, 9:30, 7:28] = 1
    return edited, source, mask


def laplacian(picture: torch.Tensor) -> torch.Tensor:
    """4 p - its neighbours, of the inner pixels of [H,W,3]."""
    p = picture.double()
    return 4 * p[1:-1, 1:-1] - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]


def test_inside_are_the_gradients_of_the_edit_and_outside_is_the_source() -> None:
    edited, source, mask = pictures(2)
    mask[1] = 0
    mask[1, 3:35, 20:25] = 0.3
    blended = poisson_blend(edited, source, mask)
    assert torch.equal(blended[mask == 0], source[mask == 0])
    for i, (one, target) in enumerate(zip(blended, edited, strict=True)):
        inside = mask[i, 1:-1, 1:-1] > 0
        assert (laplacian(one) - laplacian(target))[inside].abs().max() < 2e-5


@pytest.mark.parametrize("offset", [0.2, -0.15])
def test_a_copy_in_another_brightness_becomes_the_source(offset: float) -> None:
    _, source, mask = pictures()
    blended = poisson_blend(source + offset, source, mask)
    torch.testing.assert_close(blended, source, rtol=0, atol=1e-5)


def test_between_two_levels_the_membrane_is_a_ramp() -> None:
    """In one dimension a harmonic function is a straight line; the picture's border prescribes nothing."""
    values = torch.zeros(1, 12, 31, dtype=torch.float64)
    values[:, :, -1] = 1
    inside = torch.zeros(12, 31, dtype=torch.bool)
    inside[:, 1:-1] = True
    ramp = torch.arange(31, dtype=torch.float64) / 30
    torch.testing.assert_close(membrane(values, inside)[0, :, 1:-1], ramp[1:-1].expand(12, -1), rtol=0, atol=1e-4)


def test_one_pixel_is_the_mean_of_its_neighbours() -> None:
    values = torch.rand(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, column, around in ((2, 2, ((1, 2), (3, 2), (2, 1), (2, 3))), (0, 0, ((0, 1), (1, 0)))):
        inside = torch.zeros(5, 5, dtype=torch.bool)
        inside[row, column] = True
        mean = torch.stack([values[:, y, x] for y, x in around]).mean(0)
        torch.testing.assert_close(membrane(values, inside)[:, row, column], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right", "frame"])
def test_masks_may_touch_the_border(side: str) -> None:
    _, source, mask = pictures()
    part = {
        "top": (slice(0, 11), slice(None)),
        "bottom": (slice(25, None), slice(4, 9)),
        "left": (slice(None), slice(0, 17)),
        "right": (slice(3, 30), slice(35, None)),
        "frame": (slice(None), slice(None)),
    }[side]
    mask[:] = 0
    mask[(0, *part)] = 1
    if side == "frame":
        mask[:, 12:20, 12:20] = 0
    torch.testing.assert_close(poisson_blend(source + 0.2, source, mask), source, rtol=0, atol=2e-5)


def test_an_empty_mask_gives_the_source_and_inputs_stay() -> None:
    edited, source, mask = pictures(3)
    copies = [tensor.clone() for tensor in (edited, source, mask)]
    result = poisson_blend(edited, source[:1], torch.zeros_like(mask[:1]))
    assert torch.equal(result, source[:1].expand_as(result))
    shared = poisson_blend(edited, source[:1], mask[:1])
    assert torch.equal(shared[1:2], poisson_blend(edited[1:2], source[:1], mask[:1]))
    assert all(torch.equal(*pair) for pair in zip((edited, source, mask), copies, strict=True))
    assert poisson_blend(edited.half(), source, mask).dtype == torch.float32
    assert poisson_blend(edited * 0, source, mask).min() >= 0 and poisson_blend(edited * 0 + 1, source, mask).max() <= 1


def test_errors_say_what_to_do() -> None:
    edited, source, mask = pictures(2)
    with pytest.raises(InvalidImage, match=r"above 0 everywhere.*Paint"):
        poisson_blend(edited, source, torch.ones_like(mask))
    with pytest.raises(InvalidImage, match=r"edited image: got.*36x30 pixels.*36x40"):
        poisson_blend(edited[:, :30], source, mask)
    with pytest.raises(InvalidImage, match=r"mask: got 2 in.*batch of 1"):
        poisson_blend(edited[:1], source[:1], mask)
