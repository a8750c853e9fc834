"""Which layers the UNet of a diffusers pipeline has."""

from __future__ import annotations

from typing import Any


def attention_blocks(unet: Any) -> list[str]:
    """The block of every transformer block in the order they run: "down.0", "mid.0", "up.2"."""
    parts = [
        *((f"down.{level}", block) for level, block in enumerate(unet.down_blocks)),
        ("mid.0", unet.mid_block),
        *((f"up.{level}", block) for level, block in enumerate(unet.up_blocks)),
    ]
    return [
        name
        for name, block in parts
        for transformer in getattr(block, "attentions", [])
        for _ in transformer.transformer_blocks
    ]
