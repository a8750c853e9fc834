"""Pixel metrics of image batches, whole or over a region: MSE, PSNR, SSIM, 8-bit differences.

Every function takes ``image`` and ``target`` [B,H,W,3] in 0..1, a ``region`` [B or 1,H,W] of bool or None for the whole
picture, and returns one value per image [B] on the CPU; NaN where the region of an image has no pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_image, check_same_size, describe, match_batch
from ..core.errors import InvalidImage, require

PSNR_CAP = 100.0
"""dB given to identical pictures and latents, whose PSNR is infinite and which JSON could not hold; far beyond what 8
bits resolve (one level is 48 dB). The one cap of the whole library."""

SSIM_WINDOW = 11
_SSIM_BORDER = SSIM_WINDOW // 2


def _pair(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    image, target = check_image("image", image), check_image("target image", target)
    check_same_size("image", image, "the target image", target)
    target = match_batch(target, image.shape[0], "target image")
    # 64-bit: the mean of a megapixel of tiny squares, and E[x^2] - E[x]^2 in SSIM, lose digits in 32. On the CPU, since
    # not every device has 64-bit floats.
    return image.cpu().double(), target.cpu().double()


def _mean(values: Tensor, region: Tensor | None) -> Tensor:
    """Mean of ``values`` [B,H,W] over each image's region."""
    if region is None:
        return values.mean(dim=(1, 2))
    if region.dtype != torch.bool or region.shape[1:] != values.shape[1:]:
        raise InvalidImage(
            f"region: got {describe(region)}, but a bool tensor [B, {values.shape[1]}, {values.shape[2]}] is needed. "
            "Compare the mask with a number, for example mask > 0."
        )
    inside = match_batch(region, values.shape[0], "region").to(values)
    return (values * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))


def mse(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean squared error [B]; 0 for identical pictures. Raises InvalidImage."""
    image, target = _pair(image, target)
    return _mean((image - target).square().mean(dim=-1), region)


def psnr(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB [B]: 10 log10(1 / MSE), at most :data:`PSNR_CAP`. Raises InvalidImage."""
    return decibel(mse(image, target, region))


def decibel(error: Tensor) -> Tensor:
    """PSNR of a mean squared error of pictures in 0..1, at most :data:`PSNR_CAP`."""
    return (-10 * torch.log10(error)).clamp(max=PSNR_CAP)


def ssim_map(image: Tensor, target: Tensor) -> Tensor:
    """SSIM at every pixel [B,H,W], mean over the channels; windows at the border see mirrored pixels.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13).

    Raises:
        InvalidImage: not images, different sizes, or smaller than the window.
        MissingPackage: kornia is not installed.
    """
    image, target = _pair(image, target)
    if min(image.shape[1:3]) < SSIM_WINDOW:
        raise InvalidImage(
            f"image: got {describe(image)}, but SSIM needs at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels. "
            "Use a larger one."
        )
    kornia = require("kornia.metrics", "measure SSIM", "kornia")
    # eps 0: the constants already keep the denominator away from 0, and identical pictures get exactly 1.
    values: Tensor = kornia.ssim(image.movedim(-1, 1), target.movedim(-1, 1), SSIM_WINDOW, max_val=1.0, eps=0.0)
    return values.mean(dim=1)


def ssim(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity [B], at most 1.

    For the whole picture the mean over the pixels whose window lies inside it, as Wang et al. 2004, and scikit-image
    with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``. For a region the mean of :func:`ssim_map`
    over all of its pixels, border ones too; a window at the region's edge sees up to 5 pixels of the other side.

    Raises:
        InvalidImage, MissingPackage: as :func:`ssim_map`.
    """
    return pool_ssim(ssim_map(image, target), region)


def pool_ssim(values: Tensor, region: Tensor | None = None) -> Tensor:
    """The mean of an SSIM map [B,H,W] as :func:`ssim` defines it: inner pixels of the whole, all pixels of a region."""
    if region is None:
        b = _SSIM_BORDER
        return values[:, b:-b, b:-b].mean(dim=(1, 2))
    return _mean(values, region)


def eight_bit_difference(image: Tensor, target: Tensor) -> Tensor:
    """Largest difference over the channels of each pixel [B,H,W], int, in levels 0..255 after rounding to 8 bits."""
    image, target = _pair(image, target)
    return ((image * 255).round() - (target * 255).round()).abs().amax(dim=-1).to(torch.int64)


def changed_pixels(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Share 0..1 of pixels [B] that differ in any channel after rounding to 8 bits. Raises InvalidImage."""
    return _mean((eight_bit_difference(image, target) > 0).double(), region)
