"""Images from latents that cost next to nothing, for guidance that needs no more than a rough look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import UnsupportedModel

Decoder = Callable[[Tensor], Tensor]
"""Latents ``[B, C, h, w]`` to images ``[B, 3, H, W]`` around -1..1, with gradients."""


def linear_decoder(factors: Tensor, bias: Tensor | None = None) -> Decoder:
    """The linear map that previews use: ``factors`` ``[C, 3]`` (and ``bias`` ``[3]``) to colours in -1..1.

    One pixel for each latent cell: colours and rough outlines are there, nothing finer.

    Raises:
        UnsupportedModel: latents of another number of channels arrive.
    """

    def decode(latent: Tensor) -> Tensor:
        if latent.shape[1] != len(factors):
            raise UnsupportedModel(
                f"The linear map to colours is for latents of {len(factors)} channels, and this model's have "
                f"{latent.shape[1]}. Pass a VAE."
            )
        image = torch.einsum("bchw,cd->bdhw", latent.float(), factors.to(latent.device, torch.float32))
        return image if bias is None else image + bias.to(image)[:, None, None]

    return decode


def pixels(latent: Tensor) -> Tensor:
    """The decoder of a pixel-space model: its latents are images."""
    return latent[:, :3].float()
