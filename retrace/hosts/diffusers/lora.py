"""The attention projections of a diffusers UNet, by the names of the Host protocol."""

from __future__ import annotations

from torch import nn

from .attention import attention_layers
from .types import UNet


def projection_layers(unet: UNet) -> dict[str, nn.Module]:
    """The linear layers of all attentions in the order they run; see :meth:`Denoiser.projections`."""
    found: dict[str, nn.Module] = {}
    for layer in attention_layers(unet):
        attention = unet.get_submodule(layer.path)
        maps = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
        found |= {f"{layer.block}.{layer.index}.attn{layer.number}.{name}": part for name, part in maps.items()}
    return found
