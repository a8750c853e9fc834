"""Structure distance: whether two images have the same layout, whatever they look like (Tumanyan et al. 2022)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..core.checks import describe, match_batch
from ..core.errors import InvalidImage


def self_similarity(tokens: Tensor) -> Tensor:
    """Cosine of every token with every other one: ``[B, N, C]`` to ``[B, N, N]`` (Splicing ViT Features, eq. 2)."""
    directions = F.normalize(tokens.float(), dim=-1)
    return directions @ directions.transpose(1, 2)


def spatial_tokens(tokens: Tensor) -> Tensor:
    """The tokens ``[B, N, C]`` of the parts of a square image, without the class and register tokens before them.

    N is then a square number; without it there is no telling how many come before.
    """
    return tokens[:, tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2 :]


def structure_distance(tokens: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the self-similarities of two images ``[B]``: 0 for the same structure.

    Eq. 3 of the paper is the Frobenius norm of the difference; its code and PIE-Bench (Ju et al. 2024) take the mean of
    the squares, as here. They take the keys of DINO's last layer with the class token; tokens of another network, or
    outputs of a block, give other numbers: compare only what one network measured.

    Args:
        tokens: spatial tokens ``[B, N, C]`` of a vision transformer, for example of
            :meth:`ImageTextModel.visual_tokens`.
        target: those of the other image, ``[B or 1, N, C]``.

    Raises:
        InvalidImage: not tokens, or of another number.
    """
    if tokens.ndim != 3 or target.ndim != 3 or tokens.shape[1] != target.shape[1]:
        raise InvalidImage(
            f"tokens: got {describe(tokens)} and {describe(target)}, but [B, N, C] with the same N is needed. Take "
            "both from one network, and from images of one size."
        )
    target = match_batch(target, tokens.shape[0], "target tokens").to(tokens.device)
    difference = self_similarity(tokens) - self_similarity(target)
    return difference.cpu().double().square().mean(dim=(1, 2))
