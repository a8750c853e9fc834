"""CLIP score: how well a picture, or a part of it, shows what the words say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clip import ImageTextModel
from ..errors import InvalidImage
from ..validation import check_image, describe, match_batch


@dataclass(frozen=True)
class ClipScores:
    """CLIP scores [B] of the parts of a picture, float64 on the CPU; NaN where an image has no such part."""

    whole: Tensor
    inside: Tensor
    """everything outside the region is black, as PIE-Bench scores the edited part (Ju et al. 2024)"""
    outside: Tensor
    """the region is filled with the model's mean colour, which is 0 to the network"""
    box: Tensor
    """only the region's bounding box, cut out with everything in it and enlarged to the model's size"""


def clip_score(image: Tensor, prompt: str, clip: ImageTextModel) -> Tensor:
    """Cosine of pictures and words [B], -1..1 (Hessel et al. 2021); times 100 it is what most tables call CLIP score.

    Args:
        image: [B,H,W,3], 0..1, of any size; see :meth:`ImageTextModel.preprocess`.
        prompt: one text for all.

    Raises:
        InvalidImage: not images.
    """
    return _cosines(list(check_image("image", image).split(1)), prompt, clip)


def clip_scores(image: Tensor, prompt: str, clip: ImageTextModel, region: Tensor) -> ClipScores:
    """:func:`clip_score` of the whole picture and of its parts inside and outside of a region.

    Black hides what is outside from PIE-Bench's score, and the shape of the edge is seen with it. The box keeps the
    surroundings, but shows them large. Neither is comparable with the other, nor with the whole picture.

    Args:
        image: [B,H,W,3], 0..1.
        region: bool [B or 1,H,W].

    Raises:
        InvalidImage: not images, or no region of their size.
    """
    image = check_image("image", image)
    if region.dtype != torch.bool or region.shape[1:] != image.shape[1:3]:
        raise InvalidImage(
            f"region: got {describe(region)}, but a bool tensor [B, {image.shape[1]}, {image.shape[2]}] is needed. "
            "Compare the mask with a number, for example mask > 0."
        )
    region = match_batch(region, image.shape[0], "region").to(image.device)
    mean = image.new_tensor(clip.mean)
    views: dict[str, list[Tensor | None]] = {"whole": [], "inside": [], "outside": [], "box": []}
    for picture, part in zip(image, region, strict=True):
        some, other = bool(part.any()), not bool(part.all())
        views["whole"].append(picture[None])
        views["inside"].append((picture * part[..., None])[None] if some else None)
        views["outside"].append(torch.where(part[..., None], mean, picture)[None] if other else None)
        views["box"].append(_box(picture, part)[None] if some else None)
    return ClipScores(**{name: _cosines(parts, prompt, clip) for name, parts in views.items()})


def _box(picture: Tensor, part: Tensor) -> Tensor:
    rows, columns = part.any(dim=1).nonzero(), part.any(dim=0).nonzero()
    return picture[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _cosines(pictures: list[Tensor] | list[Tensor | None], prompt: str, clip: ImageTextModel) -> Tensor:
    with torch.no_grad():
        words = clip.encode_texts([prompt])[0].cpu().double()
        # One by one: they may be of different sizes, and a batch of large pictures need not fit.
        rows = [torch.nan if p is None else float(clip.encode_images(p)[0].cpu().double() @ words) for p in pictures]
    return torch.tensor(rows, dtype=torch.float64)
