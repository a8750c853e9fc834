"""Ranking of candidates: which picture of a batch shows best what the words say (Avrahami et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_image, check_mask, match_batch
from ..core.errors import RetraceError
from ..metrics.clip_score import View, cosines, region_views
from ..models.clip.model import ImageTextModel
from .losses import spherical_distance

Region = Literal["masked", "box", "whole"]
"""What the CLIP sees: the masked part with black around it (the paper), its bounding box cut out, or everything."""

_VIEWS: dict[Region, View] = {"masked": "inside", "box": "box", "whole": "whole"}


@dataclass(frozen=True)
class Ranking:
    """``order`` holds places in the batch, the best first; ``scores`` [B] float64 are in the order of the batch."""

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
        """A short line for each picture, the best first."""
        return [f"{rank}: {self.scores[i]:.4f} [{i}]" for rank, i in enumerate(self.order, 1)]


def rank_by_clip(
    image: Tensor,
    prompt: str,
    clip: ImageTextModel,
    mask: Tensor | None = None,
    region: Region = "masked",
    parity: bool = False,
) -> Ranking:
    """Order the pictures of a batch by how well they show ``prompt``; equal ones stay in the order of the batch.

    By default the score is the cosine of :func:`retrace.metrics.clip_score`. ``parity`` is the Blended Diffusion
    reference: resized without a filter (bilinear), shown without the model's mean and standard deviation, and compared
    by the spherical distance. Its CLIP so sees paler pictures than it was trained on.

    Args:
        image: [B,H,W,3], 0..1.
        mask: [B or 1,H,W]; every pixel above 0 belongs to the region. None is the whole picture.

    Raises:
        InvalidImage: not images or a mask, different sizes, an empty mask.
        RetraceError: an empty prompt, an unknown region, or scores that are NaN.
    """
    image = check_image("images", image)
    if not prompt.strip():
        raise RetraceError("prompt: it is empty, so there is nothing to rank by. Say in words what you want to see.")
    if region not in get_args(Region):
        raise RetraceError(f"region: got {region!r}, but one of {', '.join(get_args(Region))} is needed.")
    size = (image.shape[1], image.shape[2])
    if mask is None or region == "whole":
        selected = torch.ones(1, *size, dtype=torch.bool)
    else:
        selected = match_batch(check_mask("mask", mask, size) > 0, len(image), "mask")
    # An empty mask is an error above, so that every picture has its part.
    pictures = [shown for shown in region_views(image, selected, clip, _VIEWS[region]) if shown is not None]
    scores = _reference_distances(pictures, prompt, clip) if parity else cosines(pictures, prompt, clip)
    if bool(scores.isnan().any()):
        number = int(scores.isnan().nonzero()[0])
        raise RetraceError(
            f"The CLIP '{clip.name}' answers NaN to picture {number}. Its weights are broken: load the file again, or "
            "another one."
        )
    order = torch.sort(scores, descending=not parity, stable=True).indices
    return Ranking(tuple(order.tolist()), scores, parity)


def _reference_distances(pictures: Sequence[Tensor], prompt: str, clip: ImageTextModel) -> Tensor:
    rows = []
    with torch.no_grad():
        words = clip.encode_texts([prompt])
        for picture in pictures:
            pixels = picture.to(clip.device, torch.float32).movedim(-1, 1)
            pixels = F.interpolate(pixels, clip.size, mode="bilinear", align_corners=False)
            rows.append(spherical_distance(clip.model.encode_image(pixels).float(), words)[0].cpu().double())
    return torch.stack(rows)
