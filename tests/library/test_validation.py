"""Every check lets good input through unchanged, and says of bad input what arrived, what is needed and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retrace.core.checks import check_image, check_latent, check_mask, check_same_size, check_steps, match_batch
from retrace.core.errors import InvalidImage, InvalidSchedule, Remedy


def message(
    function: Callable[..., object], *args: object, error: type[Exception] = InvalidImage, **kwargs: object
) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_good_input_comes_back_as_it_is() -> None:
    image, mask, latent = torch.rand(2, 8, 9, 3), torch.rand(2, 8, 9), torch.randn(2, 4, 3, 5)
    assert check_image("image", image) is image
    assert check_mask("mask", mask, size=(8, 9)) is mask
    assert check_latent("latent", latent, channels=4) is latent
    assert check_steps("steps", 1) == 1


@pytest.mark.parametrize(
    ("image", "advice"),
    [
        (torch.rand(1, 8, 9, 4), "pass the first three"),
        (torch.rand(1, 8, 9, 1), "repeat it three times"),
        (torch.rand(1, 8, 9, 2), "2 channels"),
        (torch.rand(1, 3, 8, 9), "movedim"),
        (torch.rand(8, 9, 3), "image[None]"),
        (torch.rand(1, 8, 9), "three dimensions instead of four"),
        (torch.rand(9), "but an image batch"),
        (torch.zeros(1, 8, 9, 3, dtype=torch.uint8), "Divide 8-bit values by 255"),
        (torch.zeros(0, 8, 9, 3), "empty batch"),
    ],
)
def test_an_image_of_the_wrong_kind(image: torch.Tensor, advice: str) -> None:
    text = message(check_image, "source image", image)
    assert text.startswith("source image: got a tensor of shape " + str(list(image.shape)))
    assert "[B, H, W, 3]" in text
    assert advice in text


def test_an_image_that_is_no_tensor() -> None:
    assert "got a NoneType" in message(check_image, "image", None)
    assert "Take its 'samples' entry" in message(check_latent, "latent", {"samples": torch.zeros(1, 4, 2, 2)})


def test_image_values() -> None:
    image = torch.rand(1, 4, 4, 3)
    image[0, 1, 2, 0] = torch.nan
    image[0, 1, 2, 1] = torch.inf
    text = message(check_image, "image", image)
    assert "2 of 48 values" in text and "decode in 32-bit" in text
    assert "values from 0 to 255" in message(check_image, "image", torch.tensor([0.0, 128, 255]).expand(1, 2, 2, 3))
    assert "(x + 1) / 2" in message(check_image, "image", torch.tensor([-1.0, 0, 1]).expand(1, 2, 2, 3))


def test_the_overshoot_of_a_resize_is_clamped_and_the_input_left_alone() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:, 4:] = 1
    image = torch.nn.functional.interpolate(edge, scale_factor=3, mode="bicubic").movedim(1, -1)
    assert image.max() > 1.1 and image.min() < 0
    before = image.clone()
    assert torch.equal(check_image("image", image), image.clamp(0, 1))
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("mask", "advice"),
    [
        (torch.ones(8, 9), "mask[None]"),
        (torch.ones(1, 1, 8, 9), "mask[:, 0]"),
        (torch.ones(1, 8, 9, 3), "take one of its channels"),
        (torch.ones(1, 8, 9, 1), "take one of its channels"),
        (torch.ones(5), "but a mask batch"),
        (torch.ones(1, 8, 9, dtype=torch.int64), "Divide 8-bit values by 255"),
        (torch.ones(0, 8, 9), "empty batch"),
        (torch.full((1, 8, 9), torch.nan), "72 of 72 values"),
        (torch.full((1, 8, 9), 255.0), "values from 255 to 255"),
        (torch.full((1, 8, 9), -1.0), "values from -1 to -1"),
        (torch.zeros(1, 8, 9), "Mark the area to edit with 1"),
    ],
)
def test_a_mask_of_the_wrong_kind(mask: torch.Tensor, advice: str) -> None:
    text = message(check_mask, "mask", mask)
    assert text.startswith("mask: ") and str(list(mask.shape)) in text
    assert advice in text


def test_a_mask_of_the_wrong_size_names_both_sizes_width_first() -> None:
    text = message(check_mask, "mask", torch.ones(1, 10, 20), size=(30, 40))
    assert "20x10 pixels (width x height), but 40x30 is needed" in text
    assert "Resize the mask to the image" in text


def test_the_placeholder_mask_of_load_image_is_recognised() -> None:
    with pytest.raises(InvalidImage) as caught:
        check_mask("mask", torch.zeros(1, 64, 64), size=(512, 512), allow_empty=True)
    assert caught.value.remedy is Remedy.DRAW_MASK  # in a graph this names the MaskEditor
    assert "64x64 pixels (width x height), but 512x512 is needed. It is empty" in str(caught.value)


def test_empty_masks() -> None:
    masks = torch.ones(3, 4, 4)
    masks[1] = 0
    assert "Number 2 of the 3 masks is empty" in message(check_mask, "mask", masks)
    assert check_mask("mask", masks, allow_empty=True) is masks


def test_a_bool_mask_becomes_float() -> None:
    mask = check_mask("mask", torch.tensor([[[True, False]]]))
    assert mask.dtype == torch.float32 and mask.tolist() == [[[1, 0]]]


@pytest.mark.parametrize(
    ("samples", "advice"),
    [
        (torch.zeros(1, 4, 2, 8, 8), "video latent"),
        (torch.zeros(4, 8, 8), "Encode the image with the VAE of this model"),
        (torch.zeros(1, 16, 8, 8), "[B, 4, H, W] of finite floats is needed. A latent with 16 channels belongs"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int32), "Integers"),
        (torch.zeros(1, 4, 0, 8), "empty batch"),
        (torch.full((1, 4, 2, 2), torch.nan), "16 of 16 values"),
    ],
)
def test_a_latent_of_the_wrong_kind(samples: torch.Tensor, advice: str) -> None:
    text = message(check_latent, "latent", samples, channels=4)
    assert text.startswith("latent: ") and str(list(samples.shape)) in text
    assert advice in text


def test_steps() -> None:
    assert check_steps("inner steps", 0, minimum=0) == 0
    assert message(check_steps, "steps", 0, error=InvalidSchedule).startswith("steps: got 0, but a whole number of at")
    assert "Lower it to 50" in message(check_steps, "steps", 51, maximum=50, error=InvalidSchedule)
    assert "2.5 (float)" in message(check_steps, "steps", 2.5, error=InvalidSchedule)
    assert "True (bool)" in message(check_steps, "steps", True, error=InvalidSchedule)


def test_one_mask_serves_a_batch_and_any_other_count_is_refused() -> None:
    one = torch.rand(1, 2, 2)
    assert torch.equal(match_batch(one, 3, "mask"), one.repeat(3, 1, 1))
    three = torch.rand(3, 2, 2)
    assert match_batch(three, 3, "mask") is three
    text = message(match_batch, three, 4, "mask")
    assert text.startswith("mask: got 3 in") and "batch of 4" in text


def test_two_images_of_one_size() -> None:
    check_same_size("edited", torch.zeros(2, 4, 5, 3), "the source", torch.zeros(1, 4, 5, 3))
    text = message(check_same_size, "edited", torch.zeros(1, 4, 5, 3), "the source", torch.zeros(1, 6, 7, 3))
    assert "5x4 pixels" in text and "7x6 of the source" in text and "Resize" in text
