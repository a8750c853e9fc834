"""Where image-text models compute inside ComfyUI, and tokens from its CLIP_VISION models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.model_management
import torch
from torch import Tensor

from ...core.images import resize
from ...metrics import spatial_tokens
from ...models.clip.model import ImageTextModel
from .types import ClipVision

_RESERVE = 512 * 1024**2  # bytes for the activations of one image


@contextlib.contextmanager
def on_compute_device(clip: ImageTextModel, reserve: int = 0) -> Iterator[ImageTextModel]:
    """The model on the device where ComfyUI computes, for as long as it is needed; other models make room for it.

    ``reserve``: bytes that it will take besides its weights, where that is more than for one image.
    """
    device = comfy.model_management.get_torch_device()
    if device != clip.device:
        comfy.model_management.free_memory(clip.bytes + max(_RESERVE, reserve), device)
    with clip.on(device):
        yield clip


def vision_tokens(clip_vision: ClipVision, images: Tensor) -> Tensor:
    """Spatial tokens ``[B, N, C]`` after the last block but one of a CLIP_VISION model (DINOv2, CLIP, SigLIP ...).

    The whole image ``[B, H, W, 3]`` is squeezed to the model's square.
    """
    size = getattr(clip_vision, "image_size", 224)
    # SigLIP 2 NaFlex has no size of its own; a square image gives a square of tokens.
    side = size if size > 0 else 256
    square = resize(images[..., :3].float(), (side, side))
    rows = [clip_vision.encode_image(one)["penultimate_hidden_states"] for one in square.split(1)]
    return spatial_tokens(torch.cat(rows))
