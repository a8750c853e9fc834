"""Where image-text models compute inside ComfyUI, and tokens from its CLIP_VISION models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...metrics import spatial_tokens
from ...models.clip.model import ImageTextModel

_RESERVE = 512 * 1024**2  # bytes for the activations of one picture


@contextlib.contextmanager
def on_compute_device(clip: ImageTextModel, reserve: int = 0) -> Iterator[ImageTextModel]:
    """The model on the device where ComfyUI computes, for as long as it is needed; other models make room for it.

    ``reserve``: bytes that it will take besides its weights, where that is more than for one picture.
    """
    device = comfy.model_management.get_torch_device()
    if device != clip.device:
        comfy.model_management.free_memory(clip.bytes + max(_RESERVE, reserve), device)
    with clip.on(device):
        yield clip


def vision_tokens(clip_vision: Any, images: Tensor) -> Tensor:
    """Spatial tokens [B,N,C] after the last block but one of a CLIP_VISION model (DINOv2, CLIP, SigLIP ...).

    The whole picture [B,H,W,3] is squeezed to the model's square.
    """
    size = getattr(clip_vision, "image_size", 224)
    side = (
        size if size > 0 else 256
    )  # SigLIP 2 NaFlex has no size of its own; a square picture gives a square of tokens
    square = images[..., :3].movedim(-1, 1).float()
    if square.shape[2:] != (side, side):
        square = F.interpolate(square, (side, side), mode="bicubic", antialias=True)
    rows = [clip_vision.encode_image(one.movedim(1, -1))["penultimate_hidden_states"] for one in square.split(1)]
    return spatial_tokens(torch.cat(rows))
