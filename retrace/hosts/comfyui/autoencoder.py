"""ComfyUI's VAE alone, in its own scale: pictures to latents, and a decoder to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor, nn

from ...blending.decoder import Progress
from ...core.errors import InvalidImage, UnsupportedModel
from ...pictures.convert import to_picture
from ..common.private_decoder import private_decoder
from . import plain
from .compat import free_of_patches, runtime_state
from .gradients import gradient_mode
from .types import Vae

WEIGHT_COPIES = 4  # the weights, their gradients, and Adam's two moments
TRAINING_MEMORY = 2  # memory of a decoder's backward pass with checkpoints, against core's figure for its forward pass
_PREVIEW = 512  # pixels, the longest side


class ComfyAutoencoder:
    """What background reconstruction needs of a VAE; latents are those of a LATENT socket."""

    def __init__(self, vae: Vae) -> None:
        self.vae = vae

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents (posterior mean) ``[B, C, h, w]``; tiled when memory is short.

        Raises:
            InvalidImage: another shape, or sides that the VAE would crop.
        """
        if image.ndim != 4 or image.shape[-1] < 3:
            raise InvalidImage(f"An image of shape {tuple(image.shape)} arrived; [B, H, W, 3] in 0..1 is needed.")
        cell = int(self.vae.spacial_compression_encode())
        if image.shape[1] % cell or image.shape[2] % cell:
            raise InvalidImage(
                f"The image is {image.shape[2]} x {image.shape[1]} pixels; this VAE needs multiples of {cell}. "
                "Resize or crop it first."
            )
        with torch.inference_mode():
            latent = self.vae.encode(image[..., :3])
        return plain.alias(latent)

    @contextmanager
    def private_decoder(self, latent: Tensor) -> Iterator[nn.Module]:
        """See :meth:`Host.private_decoder`. Other models make room on the VAE's device first."""
        if latent.ndim != 4:
            raise UnsupportedModel(
                f"This VAE makes latents of shape {list(latent.shape)}, and the decoder of a still image (4 "
                "dimensions) is needed. Choose the method 'poisson', which needs no VAE."
            )
        device = self.vae.device
        if device.type != "cpu":
            comfy.model_management.free_memory(self.training_memory(latent), device)
        network = self.vae.first_stage_model
        try:
            copied = private_decoder(network, device, lambda copy, z: copy.decode(z), free_of_patches, runtime_state)
            with copied as decoder, gradient_mode(decoder):
                yield decoder
        finally:
            comfy.model_management.soft_empty_cache()

    def training_memory(self, latent: Tensor) -> int:
        """Bytes that training the decoder on ``latent`` takes."""
        decoder = getattr(self.vae.first_stage_model, "decoder", None)
        weights = sum(p.numel() for p in decoder.parameters()) * 4 if isinstance(decoder, nn.Module) else 0
        pixels = self.vae.memory_used_decode((1, *latent.shape[1:]), torch.float32)
        return int(WEIGHT_COPIES * weights + TRAINING_MEMORY * pixels)


def progress_with_preview() -> Progress:
    """Core's progress bar with the picture as it is; raises core's interrupt exception when the user pressed stop."""
    bar: Any = None

    def progress(step: int, total: int, image: Tensor) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        picture = to_picture(image[0])
        picture.thumbnail((_PREVIEW, _PREVIEW), Image.Resampling.BILINEAR)
        bar.update_absolute(step, total, ("JPEG", picture, _PREVIEW))

    return progress
