"""Names for the objects of diffusers and transformers, which are untyped and imported only where they are needed."""

from __future__ import annotations

from typing import Any, TypeAlias

UNet: TypeAlias = Any
"""A ``diffusers.UNet2DConditionModel``."""

Vae: TypeAlias = Any
"""A ``diffusers.AutoencoderKL``."""

TextModel: TypeAlias = Any
"""A ``transformers.CLIPTextModel`` or ``CLIPTextModelWithProjection``."""

Tokenizer: TypeAlias = Any
"""A ``transformers.CLIPTokenizer``."""

AttentionModule: TypeAlias = Any
"""A ``diffusers.models.attention_processor.Attention``."""

Config: TypeAlias = dict[str, Any]
"""The content of one of their JSON files."""
