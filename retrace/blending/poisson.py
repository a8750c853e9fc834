"""Poisson blending (Perez et al. 2003): the edit's gradients inside the mask, the source's own pixels around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_image, check_mask, check_same_size, match_batch
from ..core.errors import InvalidImage
from ..metrics import psnr

_SMALLEST = 4  # pixels; a grid below this has nothing coarser
_SMOOTHINGS = 3
_ROUNDS = 200  # never reached; a dozen do
_ACCURACY = 1e-6  # of the equation, in values 0..1
_TINY = 1e-300


@dataclass(frozen=True)
class PoissonResult:
    """The blended images ``[B, H, W, 3]`` in 0..1, and what they were made of."""

    image: Tensor
    edited: Tensor
    source: Tensor
    mask: Tensor

    def text(self) -> str:
        """For each image the PSNR of the background before; afterwards it is the source."""
        before = psnr(self.edited, self.source, self.mask == 0).tolist()
        return "\n".join(
            f"background of number {i}: {value:.2f} dB as decoded, now exact" for i, value in enumerate(before)
        )


def poisson_background(edited: Tensor, source: Tensor, mask: Tensor) -> PoissonResult:
    """:func:`poisson_blend` with a report."""
    return PoissonResult(poisson_blend(edited, source, mask), edited, source, mask)


def poisson_blend(edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """``edited`` inside ``mask``, with its colours shifted smoothly so that no seam is left; ``source`` outside.

    Solves the discrete Poisson equation (Perez et al. 2003, eq. 7) with the gradients of ``edited`` as guidance and
    the source's pixels around the mask as boundary. At the image's own border nothing is prescribed, so masks may
    touch it. The mask is taken as a whole: every pixel above 0 is inside.

    Args:
        edited: ``[B, H, W, 3]``, 0..1.
        source: ``[B, H, W, 3]`` or one ``[1, H, W, 3]`` for all, 0..1.
        mask: ``[B, H, W]`` or one ``[1, H, W]`` for all, 1 = edit. An empty mask gives the source.

    Returns:
        ``[B, H, W, 3]`` of the source's type and device; where the mask is 0 the source, bit for bit.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit, a mask without an outside.
    """
    edited = check_image("edited image", edited)
    source = check_image("source image", source)
    check_same_size("edited image", edited, "the source image", source)
    mask = check_mask("mask", mask, size=(source.shape[1], source.shape[2]), allow_empty=True)
    batch = edited.shape[0]
    source, mask = match_batch(source, batch, "source image"), match_batch(mask, batch, "mask")
    inside = mask > 0
    if bool(inside.flatten(1).all(1).any()):
        raise InvalidImage(
            "mask: it is above 0 everywhere, so there is no source around the edit to blend into. Paint only the area "
            "to edit (1 = edit)."
        )
    blended = []
    for one, original, part in zip(edited, source, inside.cpu(), strict=True):
        # 64-bit on the CPU, since not every device has it: the shift of a large mask is a sum of many small ones.
        difference = (original.double().cpu() - one.double().cpu()).movedim(-1, 0)
        shifted = one.double().cpu() + _shift(difference, part).movedim(0, -1)
        blended.append(torch.where(part[..., None].to(source.device), shifted.clamp(0, 1).to(source), original))
    return torch.stack(blended)


def _shift(difference: Tensor, inside: Tensor) -> Tensor:
    """The membrane through ``difference`` ``[C, H, W]`` around ``inside`` ``[H, W]``, 0 elsewhere.

    Only the part that is needed is computed.

    With f = edited + u the equation becomes Laplace's for u, whose boundary values are source - edited.
    """
    shift = torch.zeros_like(difference)
    if not bool(inside.any()):
        return shift
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    top, left = max(int(rows[0]) - 1, 0), max(int(columns[0]) - 1, 0)
    box = (slice(top, int(rows[-1]) + 2), slice(left, int(columns[-1]) + 2))
    shift[:, box[0], box[1]] = membrane(difference[:, box[0], box[1]], inside[box])
    return shift


def membrane(values: Tensor, inside: Tensor) -> Tensor:
    """The harmonic function on ``inside`` ``[H, W]`` that continues ``values`` ``[C, H, W]`` of the pixels around it.

    It is 0 elsewhere.

    Conjugate gradients, with a cycle of multigrid as preconditioner: a dozen rounds, however large the region is.
    """
    weight = inside.to(values)
    u = torch.zeros_like(values)
    residual = weight * _neighbours(values * (1 - weight))
    step, gain = torch.zeros_like(values), torch.ones_like(values[:, :1, :1])
    for _ in range(_ROUNDS):
        if float(residual.abs().max()) <= _ACCURACY:
            break
        towards = _cycle(residual, inside)
        before, gain = gain, _dot(towards, residual)
        step = towards + gain / before.clamp(min=_TINY) * step if bool(step.any()) else towards
        change = _laplace(step, weight)
        length = gain / _dot(step, change).clamp(min=_TINY)
        u, residual = u + length * step, residual - length * change
    return u


def _cycle(residual: Tensor, inside: Tensor) -> Tensor:
    """About the u whose Laplacian is ``residual``: smooth, correct on a grid of half the size, smooth again."""
    weight = inside.to(residual)
    u = _smoothed(torch.zeros_like(residual), residual, weight)
    if min(inside.shape) >= _SMALLEST:
        size = [2 * (-(-n // 2)) for n in inside.shape]
        pad = (0, size[1] - inside.shape[1], 0, size[0] - inside.shape[0])
        left = F.pad(residual - _laplace(u, weight), pad)
        coarse = F.avg_pool2d(F.pad(weight, pad)[None], 2)[0] == 1
        if bool(coarse.any()):
            found = _cycle(4 * F.avg_pool2d(left, 2) * coarse, coarse)
            finer = F.interpolate(found[None], scale_factor=2, mode="bilinear")[0]
            u = u + weight * finer[:, : inside.shape[0], : inside.shape[1]]
    return _smoothed(u, residual, weight)


def _smoothed(u: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    for _ in range(_SMOOTHINGS):
        u = u + 0.8 / 4 * (residual - _laplace(u, weight))
    return u


def _laplace(u: Tensor, weight: Tensor) -> Tensor:
    """Minus the discrete Laplacian of u, which is 0 where ``weight`` is; a pixel at the border has fewer neighbours."""
    return weight * (_neighbours(torch.ones_like(u[:1])) * u - _neighbours(u))


def _neighbours(u: Tensor) -> Tensor:
    """Sum over the four neighbours in ``[C, H, W]``; there are none beyond the border."""
    p = F.pad(u, (1, 1, 1, 1))
    return p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
