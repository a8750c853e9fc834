"""Pebble's own CLIP: the vision tower from ``clip/``, the text tower that the UNet also reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import require
from . import architecture
from .weights import weights_folder

# open_clip's image normalisation (Radford et al. 2021).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in 0..1 to what the vision tower expects."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def load_clip(folder: Path | None = None) -> tuple[Any, Any]:
    """An open_clip model in fp32 on the CPU, in evaluation mode, and its tokenizer (texts to ids ``[B, 77]``).

    Raises :class:`MissingPackage` without open_clip and :class:`InvalidFile` without
    weights.
    """
    open_clip = require("open_clip", "load Pebble's CLIP", "open_clip_torch")
    from safetensors.torch import load_file

    folder = folder or weights_folder()
    model = open_clip.CLIP(**architecture.CLIP)
    state = load_file(folder / "clip" / "open_clip_model.safetensors")
    state |= text_tower(load_file(folder / "text_encoder" / "model.safetensors"))
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False), open_clip.get_tokenizer("ViT-B-32")


def text_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip names for the text tower, from those of transformers' CLIPTextModel."""
    sd = {k.removeprefix("text_model."): v for k, v in state.items()}
    out = {
        "token_embedding.weight": sd["embeddings.token_embedding.weight"],
        "positional_embedding": sd["embeddings.position_embedding.weight"],
        "ln_final.weight": sd["final_layer_norm.weight"],
        "ln_final.bias": sd["final_layer_norm.bias"],
    }
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(architecture.CLIP["text_cfg"]["layers"]):
        new, old = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [sd[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            out |= {f"{new}{ours}.{kind}": sd[f"{old}{theirs}.{kind}"] for ours, theirs in names.items()}
    return out
