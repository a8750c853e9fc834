"""Ranking of candidates: which image of a batch best shows what the words say (Avrahami et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_choice, check_image, check_mask, match_batch
from ..core.errors import InvalidInput, RetraceError
from ..metrics.clip_score import View, cosines, region_views
from ..models.clip.model import ImageTextModel
from .losses import spherical_distance

Region = Literal["masked", "box", "whole"]
"""What the CLIP sees: the masked part with black around it (the paper), its bounding box cut out, or everything."""

_VIEWS: dict[Region, View] = {"masked": "inside", "box": "box", "whole": "whole"}


@dataclass(frozen=True)
class Ranking:
    """``order`` holds places in the batch, the best first; ``scores`` ``[B]`` float64 are in the order of the batch."""

    order: tuple[int, ...]
    scores: Tensor
    distance: bool
    """the scores are distances, 0 the best; else cosines, 1 the best"""

    def text(self) -> str:
        """A table: rank from 1, place in the batch from 0, score."""
        name = "distance (lower is better)" if self.distance else "cosine (higher is better)"
        rows = [f"{rank:>4}{i:>7}  {self.scores[i]:.4f}" for rank, i in enumerate(self.order, 1)]
        return "\n".join([f"rank  index  {name}", *rows])

    def labels(self) -> list[str]:
        """A short line for each image, the best first."""
        return [f"{rank}: {self.scores[i]:.4f} [{i}]" for rank, i in enumerate(self.order, 1)]


def rank_by_clip(
    image: Tensor, prompt: str, clip: ImageTextModel, mask: Tensor | None = None, region: Region = "masked"
) -> Ranking:
    """Order the images of a batch by how well they show ``prompt``; equal ones stay in the order of the batch.

    The score is the cosine of :func:`retrace.metrics.clip_score`.

    Args:
        image: ``[B, H, W, 3]``, 0..1.
        mask: ``[B or 1, H, W]``; every pixel above 0 belongs to the region. None is the whole image.

    Raises:
        InvalidImage: not images or a mask, different sizes, an empty mask.
        InvalidInput: an empty prompt.
        InvalidSetting: an unknown region.
        RetraceError: scores that are NaN.
    """
    scores = cosines(_seen(image, prompt, clip, mask, region), prompt, clip)
    return _ranking(scores, clip, distance=False)


def rank_by_reference(
    image: Tensor, prompt: str, clip: ImageTextModel, mask: Tensor | None = None, region: Region = "masked"
) -> Ranking:
    """:func:`rank_by_clip` as the code of Blended Diffusion does it.

    Images are resized without a filter (bilinear), shown without the model's mean and standard deviation, and compared
    by the spherical distance. The CLIP therefore sees paler images than it was trained on.
    """
    scores = _reference_distances(_seen(image, prompt, clip, mask, region), prompt, clip)
    return _ranking(scores, clip, distance=True)


def _seen(image: Tensor, prompt: str, clip: ImageTextModel, mask: Tensor | None, region: Region) -> list[Tensor]:
    """What is shown of each image, after the checks of both rankings."""
    image = check_image("images", image)
    if not prompt.strip():
        raise InvalidInput("prompt: it is empty, so there is nothing to rank by. Say in words what you want to see.")
    check_choice("region", region, get_args(Region))
    size = (image.shape[1], image.shape[2])
    if mask is None or region == "whole":
        selected = torch.ones(1, *size, dtype=torch.bool)
    else:
        selected = match_batch(check_mask("mask", mask, size) > 0, len(image), "mask")
    # An empty mask is an error above, so that every image has its part.
    return [shown for shown in region_views(image, selected, clip, _VIEWS[region]) if shown is not None]


def _ranking(scores: Tensor, clip: ImageTextModel, *, distance: bool) -> Ranking:
    if bool(scores.isnan().any()):
        number = int(scores.isnan().nonzero()[0])
        raise RetraceError(
            f"The CLIP '{clip.name}' answers NaN to image {number}. Its weights are broken: load the file again, or "
            "another one."
        )
    order = torch.sort(scores, descending=not distance, stable=True).indices
    return Ranking(tuple(order.tolist()), scores, distance)


def _reference_distances(images: Sequence[Tensor], prompt: str, clip: ImageTextModel) -> Tensor:
    rows = []
    with torch.no_grad():
        words = clip.encode_texts([prompt])
        for image in images:
            pixels = image.to(clip.device, torch.float32).movedim(-1, 1)
            pixels = F.interpolate(pixels, clip.size, mode="bilinear", align_corners=False)
            rows.append(spherical_distance(clip.model.encode_image(pixels).float(), words)[0].cpu().double())
    return torch.stack(rows)
