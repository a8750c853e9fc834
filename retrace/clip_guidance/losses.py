"""What guidance asks of an image, each as one number per image ``[B]`` that gradients flow through."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared geodesic distance of unit vectors ``[..., D]``, halved: ``2 arcsin(|a - b| / 2)^2``, 0 to pi^2 / 2.

    Crowson's loss for CLIP, which Avrahami et al. 2022 use instead of the cosine distance of their eq. 4: it has the
    same order, and a gradient that grows with the angle.
    """
    # The norm has no gradient at 0, where the distance is at its minimum anyway.
    half = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).clamp(min=1e-12).sqrt() / 2
    return 2 * half.clamp(max=1 - 1e-6).arcsin().square()


def range_loss(image: Tensor) -> Tensor:
    """How far ``image`` ``[B, C, H, W]`` leaves -1..1: mean squared excess over channels and pixels."""
    return (image - image.clamp(-1, 1)).square().mean((1, 2, 3))


def background_mse(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference outside ``mask`` (Avrahami et al. 2022, eq. 5, second term).

    ``image`` and ``source`` are ``[B, 3, H, W]`` in -1..1, ``mask`` ``[B or 1, 1, H, W]``, 1 = edit. The mean is over
    the whole image.
    """
    return reference_background_mse(image, source * (1 - mask), mask)


def reference_background_mse(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """:func:`background_mse` as in the authors' code, which leaves the source unmasked.

    That adds the source's part inside the mask, a constant.
    """
    return (image * (1 - mask) - source).square().mean((1, 2, 3))
