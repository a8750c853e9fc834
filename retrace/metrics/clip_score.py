"""CLIP score: how well an image, or a part of it, shows what the words say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_image
from ..models.clip.model import ImageTextModel
from .quality import check_region

View = Literal["whole", "inside", "outside", "box"]


@dataclass(frozen=True)
class ClipScores:
    """CLIP scores ``[B]`` of the parts of an image, float64 on the CPU; NaN where an image has no such part."""

    whole: Tensor
    inside: Tensor
    """everything outside the region is black, as PIE-Bench scores the edited part (Ju et al. 2024)"""
    outside: Tensor
    """the region is filled with the model's mean colour, which is 0 to the network"""
    box: Tensor
    """only the region's bounding box, cut out with everything in it and enlarged to the model's size"""


def clip_score(image: Tensor, prompt: str, clip: ImageTextModel) -> Tensor:
    """Cosine of images and words ``[B]``, -1..1 (Hessel et al. 2021); times 100 it is what most tables call CLIP score.

    Args:
        image: ``[B, H, W, 3]``, 0..1, of any size; see :meth:`ImageTextModel.preprocess`.
        prompt: one text for all.

    Raises:
        InvalidImage: not images.
    """
    return cosines(list(check_image("image", image).split(1)), prompt, clip)


def clip_scores(image: Tensor, prompt: str, clip: ImageTextModel, region: Tensor) -> ClipScores:
    """:func:`clip_score` of the whole image and of its parts inside and outside of a region.

    Black hides what is outside from PIE-Bench's score, and the shape of the edge is seen with it. The box keeps the
    surroundings, but shows them large. Neither is comparable with the other, nor with the whole image.

    Args:
        image: ``[B, H, W, 3]``, 0..1.
        region: bool ``[B or 1, H, W]``.

    Raises:
        InvalidImage: not images, or no region of their size.
    """
    image = check_image("image", image)
    return trusted_clip_scores(image, prompt, clip, check_region(region, image))


def trusted_clip_scores(image: Tensor, prompt: str, clip: ImageTextModel, region: Tensor) -> ClipScores:
    """:func:`clip_scores` of images and regions ``[B, H, W]`` that were checked."""
    words = _unit_vector(prompt, clip)
    return ClipScores(*(_cosines(_views(image, region, clip, view), words, clip) for view in get_args(View)))


def region_views(image: Tensor, region: Tensor, clip: ImageTextModel, view: View) -> list[Tensor | None]:
    """What the model is shown of each image, ``[1, h, w, 3]`` of its own size; None where there is no such part.

    Args:
        image: ``[B, H, W, 3]``, 0..1.
        region: bool ``[B or 1, H, W]``.
        view: see :class:`ClipScores`.

    Raises:
        InvalidImage: not images, or no region of their size.
    """
    image = check_image("image", image)
    return _views(image, check_region(region, image), clip, view)


def _views(image: Tensor, region: Tensor, clip: ImageTextModel, view: View) -> list[Tensor | None]:
    mean, region = image.new_tensor(clip.mean), region.to(image.device)
    shown = (_view(one, part, view, mean) for one, part in zip(image, region, strict=True))
    return [None if one is None else one[None] for one in shown]


def _view(image: Tensor, part: Tensor, view: View, mean: Tensor) -> Tensor | None:
    """What one view shows of an image ``[H, W, 3]`` with the region ``part`` ``[H, W]``."""
    if view == "whole":
        return image
    if view == "outside":
        return None if bool(part.all()) else torch.where(part[..., None], mean, image)
    if not bool(part.any()):
        return None
    return image * part[..., None] if view == "inside" else _box(image, part)


def _box(image: Tensor, part: Tensor) -> Tensor:
    rows, columns = part.any(dim=1).nonzero(), part.any(dim=0).nonzero()
    return image[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def cosines(images: Sequence[Tensor | None], prompt: str, clip: ImageTextModel) -> Tensor:
    """The cosine of each image ``[1, h, w, 3]`` and the words, float64 on the CPU; NaN where there is no image."""
    return _cosines(images, _unit_vector(prompt, clip), clip)


def _unit_vector(prompt: str, clip: ImageTextModel) -> Tensor:
    with torch.no_grad():
        return clip.encode_texts([prompt])[0].cpu().double()


def _cosines(images: Sequence[Tensor | None], words: Tensor, clip: ImageTextModel) -> Tensor:
    with torch.no_grad():
        # One by one: they may be of different sizes, and a batch of large images need not fit.
        rows = [torch.nan if i is None else float(clip.encode_images(i)[0].cpu().double() @ words) for i in images]
    return torch.tensor(rows, dtype=torch.float64)
