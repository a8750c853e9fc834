"""A smooth continuation of an image into a region of which nothing is known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.regions import around

_ROUNDS = 4
_LARGE = 1 << 18  # pixels of a level that is so near to the one above it that one round does


def fill_smoothly(image: Tensor, unknown: Tensor, wanted: Tensor) -> Tensor:
    """Colours ``[N, 3]`` for the ``wanted`` pixels (``[H, W]`` bool, all of them ``unknown``) of ``image [H, W, 3]``.

    Nearly the membrane through the known pixels around the region (Laplace's equation), solved once from coarse to
    fine: each level halves the image, starts the unknown pixels from the level above, and takes the mean of each
    one's neighbours a few times. Without a known pixel it is the mean colour.
    """
    if not bool(wanted.any()):
        return image[wanted]
    if bool(unknown.all()):
        return image.mean((0, 1)).expand(int(wanted.sum()), 3)
    box = around(unknown, 1)
    known = (~unknown[box]).float()[None, None]
    return _level(image[box].float().movedim(-1, 0)[None], known)[0].movedim(0, -1)[wanted[box]].to(image)


def _level(values: Tensor, known: Tensor) -> Tensor:
    """``values`` ``[1, 3, h, w]`` where ``known`` ``[1, 1, h, w]`` is 1, continued elsewhere."""
    height, width = values.shape[-2:]
    if bool(known.all()):
        return values
    pad = (0, width % 2, 0, height % 2)
    share = F.avg_pool2d(F.pad(known, pad), 2)
    coarse = F.avg_pool2d(F.pad(values * known, pad), 2) / share.clamp(min=0.25)
    coarse = _level(coarse, (share > 0).to(known))
    guess = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    filled = torch.lerp(guess, values, known)
    for _ in range(_ROUNDS if height * width <= _LARGE else 1):
        wide = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = (wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1] + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]) / 4
        filled = torch.lerp(around, values, known)
    return filled
