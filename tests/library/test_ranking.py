"""Rank by CLIP with a stand-in whose vectors are mean colours, so that the order is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from retrace.clip_guidance.ranking import Region, rank_by_clip, rank_by_reference
from retrace.core.errors import InvalidImage, InvalidInput, InvalidSetting, RetraceError
from retrace.models.clip.model import ImageTextModel
from retrace.pictures.labels import with_labels


class MeanColour(ImageTextModel):
    """Pictures become the direction of their mean colour; "red" is that of red."""

    name, mean, size, device = "stand-in", (0.2, 0.4, 0.6), (8, 8), torch.device("cpu")

    def __init__(self) -> None:
        self.model = self
        self.raw: list[torch.Tensor] = []

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(1, 2)), dim=-1)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.raw.append(pixels)
        return pixels.mean(dim=(2, 3))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        assert texts == ["red"]
        return torch.tensor([[1.0, 0.0, 0.0]])


def candidates() -> tuple[torch.Tensor, torch.Tensor]:
    """Four pictures [4,16,16,3]: their masked parts are more or less red, and their grounds the other way round."""
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:8, 6:12] = 1
    reds = torch.tensor([0.2, 0.9, 0.5, 0.9])
    inside, outside = torch.zeros(4, 1, 1, 3), torch.zeros(4, 1, 1, 3)
    inside[..., 0], inside[..., 1] = reds[:, None, None], 0.5
    outside[..., 0], outside[..., 1] = 1 - reds[:, None, None], 0.5
    return torch.where(mask[..., None] > 0, inside, outside), mask


def cosine(red: float) -> float:
    return red / math.hypot(red, 0.5)


@pytest.mark.parametrize("region", ["masked", "box"])
def test_the_region_is_ranked_and_equal_ones_keep_their_order(region: Region) -> None:
    images, mask = candidates()
    ranking = rank_by_clip(images, "red", MeanColour(), mask, region)
    assert ranking.order == (1, 3, 2, 0) and not ranking.distance
    assert ranking.scores.tolist() == pytest.approx([cosine(red) for red in (0.2, 0.9, 0.5, 0.9)], rel=1e-5)
    rows = ranking.text().splitlines()
    assert "higher is better" in rows[0] and rows[1].split() == ["1", "1", f"{cosine(0.9):.4f}"]
    assert ranking.labels()[3] == f"4: {cosine(0.2):.4f} [0]"


def test_whole_pictures_need_no_mask() -> None:
    images, mask = candidates()
    ranking = rank_by_clip(images, "red", MeanColour(), mask, "whole")
    assert ranking.order == (0, 2, 1, 3)
    assert ranking.order == rank_by_clip(images, "red", MeanColour()).order
    assert rank_by_clip(images, "red", MeanColour(), torch.zeros_like(mask), "whole").order == ranking.order


def test_a_batch_of_one_and_a_mask_for_each() -> None:
    images, mask = candidates()
    assert rank_by_clip(images[:1], "red", MeanColour(), mask).order == (0,)
    masks = mask.repeat(4, 1, 1)
    masks[3] = 1 - masks[3]
    assert rank_by_clip(images, "red", MeanColour(), masks, "masked").order == (1, 2, 0, 3)


def test_the_reference_ranks_by_a_distance() -> None:
    """2 arcsin(|u - v| / 2)^2 of unit vectors is half the squared angle, of pictures in 0..1 without mean and std."""
    images, mask = candidates()
    clip = MeanColour()
    ranking = rank_by_reference(images, "red", clip, mask, "masked")
    assert ranking.order == (1, 3, 2, 0) and ranking.distance and "lower is better" in ranking.text()
    angles = [math.acos(cosine(red)) ** 2 / 2 for red in (0.2, 0.9, 0.5, 0.9)]
    assert ranking.scores.tolist() == pytest.approx(angles, rel=1e-4)
    assert len(clip.raw) == 4
    halved = (images * mask[..., None]).movedim(-1, 1)
    # Half the size without a filter: the means of 2x2 pixels.
    assert torch.allclose(torch.cat(clip.raw), torch.nn.functional.avg_pool2d(halved, 2), atol=1e-6)


def test_errors_say_what_to_do() -> None:
    images, mask = candidates()
    with pytest.raises(InvalidImage, match=r"mask: got.*0 everywhere"):
        rank_by_clip(images, "red", MeanColour(), mask * 0)
    with pytest.raises(InvalidImage, match=r"Number 2 of the 4 masks is empty"):
        rank_by_clip(images, "red", MeanColour(), mask * torch.tensor([1.0, 0, 1, 1])[:, None, None])
    with pytest.raises(InvalidImage, match=r"mask: got 2 in.*batch of 4"):
        rank_by_clip(images, "red", MeanColour(), mask.repeat(2, 1, 1))
    with pytest.raises(InvalidImage, match=r"images: 1 of 3072 values"):
        images[0, 0, 0, 0] = float("nan")
        rank_by_clip(images, "red", MeanColour(), mask)
    with pytest.raises(InvalidInput, match=r"prompt: it is empty"):
        rank_by_clip(images[1:], " ", MeanColour(), mask)
    with pytest.raises(InvalidSetting, match=r"region: got 'circle'"):
        rank_by_clip(images[1:], "red", MeanColour(), mask, "circle")  # type: ignore[arg-type]


def test_scores_that_are_no_numbers_are_not_sorted() -> None:
    images, mask = candidates()
    clip = MeanColour()
    clip.encode_texts = lambda texts: torch.full((1, 3), float("nan"))  # type: ignore[method-assign]
    for rank in (rank_by_clip, rank_by_reference):
        with pytest.raises(RetraceError, match=r"'stand-in' answers NaN to image 0"):
            rank(images, "red", clip, mask)


def test_labels_stand_below_the_pictures() -> None:
    images = torch.rand(2, 20, 128, 3)
    shown = with_labels(images, ["1: 0.3012 [4]", "2: 0.2999 [0]"])
    assert shown.shape == (2, 36, 128, 3) and torch.equal(shown[:, :20], images)
    strips = shown[:, 20:]
    assert strips.max() > 0.8 and strips[:, :, -8:].max() < 0.2 and not torch.equal(strips[0], strips[1])
