"""Paste Background keeps every bit outside the mask."""

from __future__ import annotations

import pytest
import torch

from retrace.blending.paste import paste_background
from retrace.core.errors import InvalidImage, InvalidSetting


def pictures(batch: int = 2, height: int = 24, width: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    edited = torch.rand(batch, height, width, 3, generator=generator)
    source = torch.randint(0, 256, (batch, height, width, 3), generator=generator).float() / 255
    mask = torch.zeros(batch, height, width)
    mask[:, 6:18, 4:15] = 1
    return edited, source, mask


def saved(image: torch.Tensor) -> torch.Tensor:
    """As ComfyUI's Save Image stores it: cut, not rounded."""
    return (image * 255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("feather", [0, 1, 2.5, 8])
def test_outside_the_mask_every_bit_is_the_source(feather: float) -> None:
    edited, source, mask = pictures()
    result = paste_background(edited, source, mask, feather)
    outside = mask == 0
    assert torch.equal(result[outside], source[outside])
    assert torch.equal(saved(result)[outside], saved(source)[outside])
    assert torch.equal((result * 255).round()[outside], (source * 255).round()[outside])
    assert not torch.equal(result[~outside], source[~outside])


def test_every_8_bit_value_survives_next_to_any_edit() -> None:
    source = (torch.arange(256).float() / 255).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    result = paste_background(1 - source, source, torch.eye(16)[None], 2)
    outside = torch.eye(16) == 0
    assert torch.equal(saved(result)[0][outside], saved(source)[0][outside])
    assert torch.equal(saved(source)[0, ..., 0].flatten(), torch.arange(256, dtype=torch.uint8))


def test_without_feather_the_inside_is_the_edit_bit_for_bit() -> None:
    edited, source, mask = pictures()
    result = paste_background(edited, source, mask)
    assert torch.equal(result[mask == 1], edited[mask == 1])


def test_soft_masks_mix_linearly() -> None:
    edited, source, mask = pictures()
    mask[:, 8:12, 6:10] = 0.25
    result = paste_background(edited, source, mask)
    soft = mask == 0.25
    assert torch.allclose(result[soft], 0.75 * source[soft] + 0.25 * edited[soft])


def test_feather_fades_inward_and_ends_on_the_edit() -> None:
    edited, source, mask = pictures(1)
    result = paste_background(torch.ones_like(edited), torch.zeros_like(source), mask, 3)
    row = result[0, 12, :, 0]
    assert row[:4].max() == 0 and row[15:].max() == 0
    assert (row[4:8].diff() > 0).all() and row[7] == 1


def test_empty_and_full_masks() -> None:
    edited, source, mask = pictures()
    assert torch.equal(paste_background(edited, source, torch.zeros_like(mask), 2), source)
    assert torch.equal(paste_background(edited, source, torch.ones_like(mask), 2), edited)


def test_one_source_and_one_mask_serve_a_batch() -> None:
    edited, source, mask = pictures(3)
    result = paste_background(edited, source[:1], mask[:1], 1)
    for one, alone in zip(result, edited, strict=True):
        assert torch.equal(one, paste_background(alone[None], source[:1], mask[:1], 1)[0])


def test_the_result_has_the_type_of_the_source_and_inputs_stay() -> None:
    edited, source, mask = pictures()
    copies = [tensor.clone() for tensor in (edited, source, mask)]
    assert paste_background(edited.half(), source, mask.half(), 2).dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip((edited, source, mask), copies, strict=True))


def test_errors_say_what_to_do() -> None:
    edited, source, mask = pictures()
    with pytest.raises(InvalidImage, match=r"edited image: got.*20x16 pixels.*20x24 of the source image.*Resize"):
        paste_background(edited[:, :16], source, mask)
    with pytest.raises(InvalidImage, match=r"mask: got.*20x16 pixels.*20x24 is needed. Resize"):
        paste_background(edited, source, mask[:, :16])
    with pytest.raises(InvalidImage, match=r"mask: got 2 in.*batch of 1"):
        paste_background(edited[:1], source[:1], mask)
    with pytest.raises(InvalidImage, match=r"source image: got.*pass the first three"):
        paste_background(edited, torch.rand(2, 24, 20, 4), mask)
    with pytest.raises(InvalidSetting, match="radius: got -1"):
        paste_background(edited, source, mask, -1)
