"""The text tower: a transformers CLIPTextModel, the form that SD1.5 pipelines read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.pebble import architecture
from ...models.pebble.scenes import COLOURS, GROUNDS, RADII, SHAPES, TEXTURES

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
    ids: Tensor = open_clip.get_tokenizer("ViT-B-32")([w for w in words if w]).unique()
    return ids[ids > 0]  # 0 is open_clip's padding


def build() -> Any:
    """A text tower with new weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # Plain attention: torch's own widens bf16 to float32, which is slow on CPUs.
    return CLIPTextModel._from_config(CLIPTextConfig(**config()), attn_implementation="eager")


def to_ship(tower: nn.Module) -> dict[str, Tensor]:
    """The state of a trained tower. Words outside the captions get a zero embedding: they say nothing."""
    state = {name.removeprefix("text_model."): weight.detach().cpu() for name, weight in tower.state_dict().items()}
    known, table = known_tokens(), "embeddings.token_embedding.weight"
    state[table] = torch.zeros_like(state[table]).index_copy(0, known, state[table][known])
    return {f"text_model.{name}": weight for name, weight in state.items() if name != "embeddings.position_ids"}
