"""Pixel metrics of image batches, whole or over a region: MSE, PSNR, SSIM, 8-bit differences.

Every function takes ``image`` and ``target`` ``[B, H, W, 3]`` in 0..1, a ``region`` ``[B or 1, H, W]`` of bool or None
for the whole image, and returns one value per image ``[B]`` on the CPU; NaN where the region of an image has no pixel.
Whoever needs several of them makes one :class:`Comparison`, which checks and converts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.checks import check_image, check_same_size, describe, match_batch
from ..core.errors import InvalidImage, require

PSNR_CAP = 100.0
"""dB given to identical images and latents, whose PSNR is infinite and which JSON could not hold; far beyond what 8
bits resolve (one level is 48 dB). The one cap of the whole library."""

SSIM_WINDOW = 11
_SSIM_BORDER = SSIM_WINDOW // 2


@dataclass(frozen=True)
class Comparison:
    """Two image batches ``[B, H, W, 3]`` as float64 on the CPU, and how they differ; each map is computed once.

    64-bit, because the mean of a megapixel of tiny squares, and E[x^2] - E[x]^2 in SSIM, lose digits in 32; on the CPU,
    because not every device has 64-bit floats.
    """

    image: Tensor
    target: Tensor

    @classmethod
    def of(cls, image: Tensor, target: Tensor) -> Comparison:
        """Of images that come from outside: ``image`` ``[B, H, W, 3]``, and as many targets or one for all.

        Raises:
            InvalidImage: not images, different sizes, batches that do not fit.
        """
        image, target = check_image("image", image), check_image("target image", target)
        check_same_size("image", image, "the target image", target)
        return cls.trusted(image, match_batch(target, image.shape[0], "target image"))

    @classmethod
    def trusted(cls, image: Tensor, target: Tensor) -> Comparison:
        """Of images that were checked and have one shape."""
        return cls(image.cpu().double(), target.cpu().double())

    @cached_property
    def squared_error(self) -> Tensor:
        """Mean over the channels of the squared difference ``[B, H, W]``."""
        return (self.image - self.target).square().mean(dim=-1)

    @cached_property
    def levels(self) -> Tensor:
        """Largest difference over the channels ``[B, H, W]``, int, in levels 0..255 after rounding to 8 bits."""
        return ((self.image * 255).round() - (self.target * 255).round()).abs().amax(dim=-1).to(torch.int64)

    @cached_property
    def ssim(self) -> Tensor:
        """See :func:`ssim_map`, and what it raises."""
        if min(self.image.shape[1:3]) < SSIM_WINDOW:
            raise InvalidImage(
                f"image: got {describe(self.image)}, but SSIM needs at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels. "
                "Use a larger one."
            )
        kornia = require("kornia.metrics", "measure SSIM", "kornia")
        image, target = self.image.movedim(-1, 1), self.target.movedim(-1, 1)
        # eps 0: the constants already keep the denominator away from 0, and identical images get exactly 1.
        values: Tensor = kornia.ssim(image, target, SSIM_WINDOW, max_val=1.0, eps=0.0)
        return values.mean(dim=1)


def mean_over(values: Tensor, region: Tensor | None) -> Tensor:
    """Mean of ``values`` ``[B, H, W]`` over a region that :func:`check_region` let pass; NaN where it is empty."""
    if region is None:
        return values.mean(dim=(1, 2))
    inside = region.to(values)
    return (values * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))


def check_region(region: Tensor, image: Tensor) -> Tensor:
    """Return ``region`` as ``[B, H, W]`` of bool when it is one for ``image`` ``[B, H, W, 3]``.

    Raises:
        InvalidImage: another type or size, or a batch that does not fit.
    """
    batch, height, width = image.shape[:3]
    if region.dtype != torch.bool or region.shape[1:] != (height, width):
        raise InvalidImage(
            f"region: got {describe(region)}, but a bool tensor [B, {height}, {width}] is needed. "
            "Compare the mask with a number, for example mask > 0."
        )
    return match_batch(region, batch, "region")


def mse(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean squared error ``[B]``; 0 for identical images. Raises InvalidImage."""
    pair = Comparison.of(image, target)
    return mean_over(pair.squared_error, None if region is None else check_region(region, pair.image))


def psnr(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[B]``: 10 log10(1 / MSE), at most :data:`PSNR_CAP`. Raises InvalidImage."""
    return decibel(mse(image, target, region))


def decibel(error: Tensor) -> Tensor:
    """PSNR of a mean squared error of images in 0..1, at most :data:`PSNR_CAP`."""
    return (-10 * torch.log10(error)).clamp(max=PSNR_CAP)


def ssim_map(image: Tensor, target: Tensor) -> Tensor:
    """SSIM at every pixel ``[B, H, W]``, mean over the channels; windows at the border see mirrored pixels.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13).

    Raises:
        InvalidImage: not images, different sizes, or smaller than the window.
        MissingPackage: kornia is not installed.
    """
    return Comparison.of(image, target).ssim


def ssim(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity ``[B]``, at most 1.

    For the whole image the mean over the pixels whose window lies inside it, as Wang et al. 2004, and scikit-image
    with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``. For a region the mean of :func:`ssim_map`
    over all of its pixels, border ones too; a window at the region's edge sees up to 5 pixels of the other side.

    Raises:
        InvalidImage, MissingPackage: as :func:`ssim_map`.
    """
    pair = Comparison.of(image, target)
    return pool_ssim(pair.ssim, None if region is None else check_region(region, pair.image))


def pool_ssim(values: Tensor, region: Tensor | None) -> Tensor:
    """The mean of an SSIM map ``[B, H, W]`` as :func:`ssim` defines it: inner pixels of the whole, all of a region."""
    if region is None:
        b = _SSIM_BORDER
        return values[:, b:-b, b:-b].mean(dim=(1, 2))
    return mean_over(values, region)


def eight_bit_difference(image: Tensor, target: Tensor) -> Tensor:
    """Largest difference over the channels ``[B, H, W]``, int, in levels 0..255 after rounding to 8 bits."""
    return Comparison.of(image, target).levels


def changed_pixels(image: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Share 0..1 of pixels ``[B]`` that differ in any channel after rounding to 8 bits. Raises InvalidImage."""
    pair = Comparison.of(image, target)
    return mean_over((pair.levels > 0).double(), None if region is None else check_region(region, pair.image))
