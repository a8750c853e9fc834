"""CLIP score: how well a picture, or a part of it, shows what the words say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_image, describe, match_batch
from ..core.errors import InvalidImage
from ..models.clip.model import ImageTextModel

View = Literal["whole", "inside", "outside", "box"]


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
    return cosines(list(check_image("image", image).split(1)), prompt, clip)


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
    views = {view: region_views(image, region, clip, view) for view in get_args(View)}
    return ClipScores(**{view: cosines(pictures, prompt, clip) for view, pictures in views.items()})


def region_views(image: Tensor, region: Tensor, clip: ImageTextModel, view: View) -> list[Tensor | None]:
    """What the model is shown of each picture, ``[1,h,w,3]`` of its own size; None where there is no such part.

    Args:
        image: [B,H,W,3], 0..1.
        region: bool [B or 1,H,W].
        view: see :class:`ClipScores`.

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
    show: dict[View, Callable[[Tensor, Tensor], Tensor]] = {
        "whole": lambda picture, part: picture,
        "inside": lambda picture, part: picture * part[..., None],
        "outside": lambda picture, part: torch.where(part[..., None], mean, picture),
        "box": _box,
    }
    exists: dict[View, Callable[[Tensor], bool]] = {
        "whole": lambda part: True,
        "inside": lambda part: bool(part.any()),
        "outside": lambda part: not bool(part.all()),
        "box": lambda part: bool(part.any()),
    }
    pairs = zip(image, region, strict=True)
    return [show[view](picture, part)[None] if exists[view](part) else None for picture, part in pairs]


def _box(picture: Tensor, part: Tensor) -> Tensor:
    rows, columns = part.any(dim=1).nonzero(), part.any(dim=0).nonzero()
    return picture[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def cosines(pictures: Sequence[Tensor | None], prompt: str, clip: ImageTextModel) -> Tensor:
    """The cosine of each picture ``[1,h,w,3]`` and the words, float64 on the CPU; NaN where there is no picture."""
    with torch.no_grad():
        words = clip.encode_texts([prompt])[0].cpu().double()
        # One by one: they may be of different sizes, and a batch of large pictures need not fit.
        rows = [torch.nan if p is None else float(clip.encode_images(p)[0].cpu().double() @ words) for p in pictures]
    return torch.tensor(rows, dtype=torch.float64)
