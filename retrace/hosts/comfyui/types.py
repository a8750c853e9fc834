"""Names for ComfyUI's own objects: their types cannot be imported where ComfyUI is not installed."""

from __future__ import annotations

from typing import Any, TypeAlias

Model: TypeAlias = Any
"""What a MODEL socket holds: a ``comfy.model_patcher.ModelPatcher``."""

Clip: TypeAlias = Any
"""What a CLIP socket holds: a ``comfy.sd.CLIP``."""

Vae: TypeAlias = Any
"""What a VAE socket holds: a ``comfy.sd.VAE``."""

ClipVision: TypeAlias = Any
"""What a CLIP_VISION socket holds: a ``comfy.clip_vision.ClipVisionModel``."""

ConditioningList: TypeAlias = list[list[Any]]
"""What a CONDITIONING socket holds: pairs of token embeddings ``[B, T, D]`` and a dict of options."""

Latent: TypeAlias = dict[str, Any]
"""What a LATENT socket holds: ``samples`` ``[B, C, h, w]`` in the VAE's scale, perhaps a ``noise_mask``."""

Options: TypeAlias = dict[str, Any]
"""``model_options`` or ``transformer_options``: nested dicts that core and node packs write into."""

Sampler: TypeAlias = Any
"""What a SAMPLER socket holds: a ``comfy.samplers.Sampler``."""

ModelSampling: TypeAlias = Any
"""The noise schedule of a model: one of the classes of ``comfy.model_sampling``."""

Network: TypeAlias = Any
"""The diffusion network behind a MODEL, mostly a ``torch.nn.Module`` of ``comfy.ldm``."""

Guider: TypeAlias = Any
"""What core samples with: a ``comfy.samplers.CFGGuider``, with its patcher, conditions and options."""

Executor: TypeAlias = Any
"""What core hands to a wrapper: calls the next one, ``class_obj`` is whose method is wrapped."""
