"""The configurations of Stable Diffusion 1.x, 2.x and XL in diffusers' form.

A checkpoint in one file holds weights only. diffusers would fetch the rest from the network; these few numbers, known
for each family, make that unnecessary.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...core.errors import InvalidFile, UnsupportedModel, require
from .types import Config

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_TEXT: Config = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
_SCHEDULER: Config = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# OpenCLIP models: H of SD 2.x without its last layer, which the model leaves out, and bigG, the second one of SDXL.
_OPEN_CLIP: Config = _TEXT | {"hidden_act": "gelu", "pad_token_id": 0}
_H = _OPEN_CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 1024,
}
_BIG_G = _OPEN_CLIP | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@dataclass(frozen=True)
class Family:
    """One architecture: its configurations as diffusers writes them."""

    name: Literal["sd1", "sd2", "sdxl"]
    unet: Config = field(default_factory=lambda: _UNET)
    vae: Config = field(default_factory=lambda: _VAE)
    text: tuple[Config, ...] = (_TEXT,)
    scheduler: Config = field(default_factory=lambda: _SCHEDULER)


def _sd2() -> Family:
    unet = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    return Family("sd2", unet=_UNET | unet, text=(_H,))


def _sdxl() -> Family:
    unet = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    }
    vae = {"sample_size": 1024, "scaling_factor": 0.13025}
    return Family("sdxl", unet=_UNET | unet, vae=_VAE | vae, text=(_TEXT, _BIG_G))


def detect(file: Path) -> Family:
    """The family of the checkpoint ``file``, from its tensors' names and shapes.

    Raises:
        InvalidFile: not a readable .safetensors file.
        UnsupportedModel: none of the three families, or a part of a model only.
    """
    safetensors = require("safetensors", "read a checkpoint")
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            dims = [n for n in names if n.startswith("model.diffusion_model.") and n.endswith("attn2.to_k.weight")]
            width = tensors.get_slice(dims[0]).get_shape()[1] if dims else 0
            probe = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
            spread = float(tensors.get_tensor(probe).float().std()) if probe in names and width == 1024 else 0.0
            channels = tensors.get_slice("model.diffusion_model.input_blocks.0.0.weight").get_shape()[1] if dims else 4
    except (OSError, safetensors.SafetensorError) as error:
        raise InvalidFile(
            f"{file.name} is not a complete .safetensors file ({error}). Copy or download it again."
        ) from error
    family = {768: Family("sd1"), 1024: _sd2(), 2048: _sdxl()}.get(width)
    has_text = any(n.startswith(("cond_stage_model.", "conditioner.embedders.")) for n in names)
    has_vae = any(n.startswith("first_stage_model.decoder.") for n in names)
    if family is None or not has_text or not has_vae:
        missing = [n for n, there in (("UNet", family), ("text encoder", has_text), ("VAE", has_vae)) if not there]
        raise UnsupportedModel(
            f"{file.name} holds no {' and no '.join(missing)} of Stable Diffusion 1.x, 2.x or XL. "
            "Give a full checkpoint of one of these, or the model as a diffusers folder."
        )
    scheduler = dict(family.scheduler)
    # SD 2.x in its 768 px version predicts v. No entry says so, but this bias does: it grew far larger there.
    if "v_pred" in names or spread > 0.09:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        scheduler["rescale_betas_zero_snr"] = True
    return Family(family.name, family.unet | {"in_channels": channels}, family.vae, family.text, scheduler)


def write(family: Family, tokenizer: Path, folder: Path) -> None:
    """Write ``family`` into ``folder`` as a pipeline without weights, with the files of ``tokenizer``."""
    xl = family.name == "sdxl"
    index: Config = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if not xl:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    parts = {"unet/config": family.unet, "vae/config": family.vae, "scheduler/scheduler_config": family.scheduler}
    for number, text in enumerate(family.text):
        suffix = f"_{number + 1}" if number else ""
        index |= {
            f"text_encoder{suffix}": ["transformers", text["architectures"][0]],
            f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"],
        }
        parts[f"text_encoder{suffix}/config"] = text
        target = folder / f"tokenizer{suffix}"
        target.mkdir(parents=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizer / name, target / name)
        pad = "!" if text["pad_token_id"] == 0 else "<|endoftext|>"
        parts[f"tokenizer{suffix}/tokenizer_config"] = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad,
            "do_lower_case": True,
            "model_max_length": 77,
        }
    parts["model_index"] = index
    for name, content in parts.items():
        target = folder / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content), encoding="utf-8")
