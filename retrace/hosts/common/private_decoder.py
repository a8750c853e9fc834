"""A decoder's own copy, to train on one picture and forget."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.errors import UnsupportedModel
from .tensors import is_quantised

_BLOCKS = ("ResnetBlock", "ResnetBlock2D")  # ComfyUI's and diffusers' residual blocks, most of a decoder's memory


class PrivateDecoder(nn.Module):
    """Latents to pictures ``[B, 3, H, W]`` around -1..1. Of its weights only the decoder's require gradients."""

    def __init__(self, autoencoder: nn.Module, decode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._decode = decode

    def forward(self, latent: Tensor) -> Tensor:
        return self._decode(self.autoencoder, latent)


@contextmanager
def private_decoder(
    autoencoder: nn.Module,
    device: torch.device,
    decode: Callable[[Any, Tensor], Tensor],
    prepared: Callable[[nn.Module], None] = lambda copied: None,
    left_out: Callable[[nn.Module], dict[int, Any]] = lambda original: {},
) -> Iterator[PrivateDecoder]:
    """A copy of ``autoencoder`` without its encoder, in float32 on ``device``, that ends with the block.

    Its residual blocks keep their inputs only and compute the rest again when gradients come back.

    Args:
        decode: ``decode(copy, latent)``.
        prepared: what else to do with the copy.
        left_out: what not to copy, and what to take instead, as the memo of :func:`copy.deepcopy`.

    Raises:
        UnsupportedModel: no part named ``decoder``, or quantised weights.
    """
    name = type(autoencoder).__name__
    trained = getattr(autoencoder, "decoder", None)
    if not isinstance(trained, nn.Module) or next(trained.parameters(), None) is None:
        raise UnsupportedModel(
            f"This VAE (a '{name}') has no decoder that could be trained. Connect the VAE of an SD1.x, SD2.x, SDXL or "
            "Flux model, or choose the method 'poisson', which needs none."
        )
    with torch.inference_mode(False):  # else the copies are inference tensors, too, which cannot be trained
        copied = _copy(autoencoder, device, left_out(autoencoder))
        prepared(copied)
        for block in copied.modules():
            if type(block).__name__ in _BLOCKS:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
    copied.decoder.requires_grad_(True)
    try:
        yield PrivateDecoder(copied, decode)
    finally:  # whoever still holds the module, as a traceback may, holds no weights
        for parameter in copied.parameters():
            parameter.grad = None
            parameter.data = torch.empty(0, device=parameter.device)


def _copy(autoencoder: nn.Module, device: torch.device, memo: dict[int, Any]) -> nn.Module:
    encoder = getattr(autoencoder, "encoder", None)
    skipped: set[int] = set()
    if isinstance(encoder, nn.Module):
        skipped = set(map(id, encoder.parameters()))
        memo[id(encoder)] = nn.Identity()
    for tensor in chain(autoencoder.parameters(), autoencoder.buffers()):
        if id(tensor) in skipped:
            continue
        if is_quantised(tensor):
            raise UnsupportedModel(
                "The VAE has quantised weights, which cannot be trained. Load its fp16, bf16 or fp32 file."
            )
        own = tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    return copy.deepcopy(autoencoder, memo).eval()
