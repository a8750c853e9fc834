"""Low-rank adapters between the Host protocol and ComfyUI: where they act, and how core's LoRA files name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from ....core.host import LowRank
from ..types import Model, Network
from .unet import attention_layers


def projection_layers(network: Network) -> dict[str, nn.Module]:
    """The linear layers of all attentions in the order they run; see :meth:`Denoiser.projections`.

    Raises :class:`UnsupportedModel` unless ``network`` is a UNet of the SD1.5 or SDXL kind.
    """
    layers = attention_layers(network)
    parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        part, number, depth = layer.key
        transformers = [each for each in parts[part][number] if hasattr(each, "transformer_blocks")]
        block = [block for each in transformers for block in each.transformer_blocks][depth]
        attention = getattr(block, layer.patch)
        maps = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
        found |= {f"{layer.block}.{layer.index}.{layer.patch}.{name}": part for name, part in maps.items()}
    return found


def lora_model(network: Network, adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """``adapters`` of ``network`` as core's LORA_MODEL: what Train LoRA gives and Save LoRA writes.

    The alpha equals the rank, so that strength 1 is the adapter as it was trained.
    """
    paths = {id(module): path for path, module in network.named_modules()}
    layers = projection_layers(network)
    state: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        path = f"diffusion_model.{paths[id(layers[name])]}"
        state[f"{path}.lora_up.weight"] = adapter.up.detach().cpu().contiguous()
        state[f"{path}.lora_down.weight"] = adapter.down.detach().cpu().contiguous()
        state[f"{path}.alpha"] = torch.tensor(float(adapter.down.shape[0]))
    return state


def patched(model: Model, lora: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the MODEL with ``lora`` on it, by core's own patches."""
    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)[0]
