"""The text tower of an open_clip model as a transformers CLIPTextModel, the form that SD1.5 pipelines read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import architecture
from ..scenes import COLOURS, GROUNDS, RADII, SHAPES, TEXTURES

START, END = 49406, 49407


def config() -> dict[str, Any]:
    text = architecture.CLIP["text_cfg"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "projection_dim": architecture.CLIP["embed_dim"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def known_tokens() -> Tensor:
    """Ids of all tokens that captions use, sorted."""
    import open_clip

    words = [*COLOURS, *SHAPES, *GROUNDS, *TEXTURES, *RADII, "a", "an", "and", "on"]
    ids = open_clip.get_tokenizer("ViT-B-32")([w for w in words if w]).unique()
    return ids[ids > 0]  # 0 is open_clip's padding


def to_transformers(clip: nn.Module) -> dict[str, Tensor]:
    """State dict with ``text_model.`` names. Words outside the captions get a zero embedding: they say nothing."""
    sd = clip.state_dict()
    known = known_tokens()
    tokens = torch.zeros_like(sd["token_embedding.weight"])
    tokens[known] = sd["token_embedding.weight"][known]
    out = {
        "embeddings.token_embedding.weight": tokens,
        "embeddings.position_embedding.weight": sd["positional_embedding"],
        "final_layer_norm.weight": sd["ln_final.weight"],
        "final_layer_norm.bias": sd["ln_final.bias"],
    }
    for i in range(architecture.CLIP["text_cfg"]["layers"]):
        old, new = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", sd[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{new}self_attn.{name}_proj.{kind}"] = part
            out[f"{new}self_attn.out_proj.{kind}"] = sd[f"{old}attn.out_proj.{kind}"]
            out[f"{new}layer_norm1.{kind}"] = sd[f"{old}ln_1.{kind}"]
            out[f"{new}layer_norm2.{kind}"] = sd[f"{old}ln_2.{kind}"]
            out[f"{new}mlp.fc1.{kind}"] = sd[f"{old}mlp.c_fc.{kind}"]
            out[f"{new}mlp.fc2.{kind}"] = sd[f"{old}mlp.c_proj.{kind}"]
    return {f"text_model.{k}": v.detach().cpu().contiguous() for k, v in out.items()}
