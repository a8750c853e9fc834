"""Blending in pixels in the last steps of a run, as the code of Blended Latent Diffusion can (Avrahami et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from ..core.checks import check_choice, check_image, check_mask
from ..core.errors import InvalidSetting
from .blend import BlendRun, Level


class ImageCodec(Protocol):
    """The part of a host that this needs; every :class:`Host` is one."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents ``[B, C, h, w]``."""
        ...

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to images ``[B, H, W, 3]`` in 0..1."""
        ...


@dataclass(frozen=True)
class PixelBlending:
    """Paste the source in pixels instead of in the latent: decode the clean estimate, paste, encode, add noise.

    A latent cell covers many pixels, so only this follows a fine mask. It costs a decoding and an encoding in each of
    these steps, and model and VAE must fit into memory together.

    Args:
        codec: the host, whose VAE it takes.
        source: ``[B or 1, H, W, 3]`` in 0..1, of a size that the VAE takes.
        mask: ``[B or 1, H, W]`` in 0..1, 1 = edit; values between mix.
        share: of the steps, the last ones (``percentage_of_pixel_blending`` in the authors' code).
        level: the noise that is added: that of the ``"next"`` step, or of the ``"current"`` one, which is too much by
            one step, as in the authors' code.

    Raises:
        InvalidImage: not an image or a mask, sizes that differ, an empty mask.
        InvalidSetting: a share outside 0..1, or another level.
    """

    codec: ImageCodec
    source: Tensor
    mask: Tensor
    share: float = 0.1
    level: Level = "next"

    def __post_init__(self) -> None:
        source = check_image("source", self.source)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "mask", check_mask("mask", self.mask, (source.shape[1], source.shape[2])))
        check_choice("level", self.level, get_args(Level))
        if not 0 <= self.share <= 1:
            raise InvalidSetting(f"share: got {self.share:g}, but a share of the steps from 0 to 1 is needed.")

    def first(self, steps: int) -> int:
        """The first of ``steps`` after which it blends in pixels."""
        return int(steps * (1 - self.share))

    def after(self, run: BlendRun, step: int, denoised: Tensor) -> Tensor:
        """The latent ``[B, C, h, w]`` after ``step``, whose clean estimate is ``denoised``."""
        decoded = self.codec.decode_latent(denoised)
        pasted = torch.lerp(self.source.to(decoded), decoded, self.mask.to(decoded)[..., None])
        clean = self.codec.encode_image(pasted).to(denoised)
        sigma, sigma_next = (float(level) for level in run.sigmas[step : step + 2])
        if self.level == "next":
            return run.noisy(clean, sigma_next, denoised)
        return run.beside(run.noisy(clean, sigma, denoised), sigma, sigma_next)
