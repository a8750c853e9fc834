"""Load Pebble, the demo model of this repository, as ComfyUI's MODEL, CLIP and VAE.

Core's loaders recognise UNets by the widths of published models and would not know this one, so its description is
built here from the diffusers configuration files; the networks themselves are core's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
from comfy.model_base import ModelType
from torch import Tensor

from ....core.errors import InvalidFile
from ....models.pebble.weights import weights_folder
from ..compat import accepted, build_clip, model_patcher_class
from ..types import Clip, Model, Vae

Config: TypeAlias = dict[str, Any]
"""A configuration file of diffusers, or core's description of a network."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
TEXT_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_act",
    "eos_token_id",
    "max_position_embeddings",
    "projection_dim",
)


def load_pebble(folder: str | Path | None = None) -> tuple[Model, Clip, Vae]:
    """MODEL, CLIP and VAE from a diffusers folder with ``unet``, ``vae`` and ``text_encoder``; without one, the
    weights that ship with this repository.

    Raises :class:`InvalidFile` when a file is missing or does not belong to its configuration.
    """
    folder = Path(folder) if folder else weights_folder()
    return load_model(folder), load_clip(folder), load_vae(folder)


def load_model(folder: str | Path, disable_dynamic: bool = False) -> Model:
    """The UNet as a ModelPatcher; core calls this again (``disable_dynamic=True``) when it needs a private copy."""
    folder = Path(folder)
    config, weights = _read(folder, "unet")
    scale = float(_config(folder, "vae").get("scaling_factor", 1.0))
    unet_config = comfy_unet_config(config)
    weights = _comfy_unet_weights(unet_config, weights, folder)

    management = comfy.model_management
    parameters = comfy.utils.calculate_parameters(weights)
    load_device = management.get_torch_device()
    description = _description(config, scale, _preview(folder), _predicts(folder))(unet_config)
    dtypes = description.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=list(dtypes), weight_dtype=comfy.utils.weight_dtype(weights)
    )
    description.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, dtypes))
    model = description.get_model(weights, "", device=management.unet_offload_device())
    patcher = model_patcher_class(disable_dynamic)(
        model, load_device=load_device, offload_device=management.unet_offload_device()
    )
    model.load_model_weights(
        weights, "", **accepted(model.load_model_weights, assign=getattr(patcher, "is_dynamic", bool)())
    )
    patcher.cached_patcher_init = (load_model, (str(folder),))
    return patcher


def load_clip(folder: str | Path, disable_dynamic: bool = False) -> Clip:
    """The text encoder; its hidden states feed the cross-attention, there is no projection."""
    config, weights = _read(Path(folder), "text_encoder")
    shape = {name: config[name] for name in TEXT_SHAPE if name in config}
    prefix = "clip_l.transformer."
    if not any(key.startswith("text_model.") for key in weights):
        prefix += "text_model."
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = build_clip(
        target,
        {prefix + key: value for key, value in weights.items()},
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"clip_l_model_config": shape},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (str(folder),))
    return clip


def load_vae(folder: str | Path) -> Vae:
    """The KL autoencoder; core renames the diffusers weights itself."""
    config, weights = _read(Path(folder), "vae")
    widths = config["block_out_channels"]
    dd = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(sd=weights, config={"params": {"embed_dim": config["latent_channels"], "ddconfig": dd}})
    vae.patcher.cached_patcher_init = (_vae_patcher, (str(folder),))
    return vae


def _clip_patcher(folder: str, disable_dynamic: bool = False) -> Model:
    return load_clip(folder, disable_dynamic).patcher


def _vae_patcher(folder: str, disable_dynamic: bool = False) -> Model:
    return load_vae(folder).patcher  # like core's own factory: a VAE decides for itself


def comfy_unet_config(config: Config) -> Config:
    """A diffusers ``UNet2DConditionModel`` configuration in the terms of ComfyUI's ``UNetModel``."""
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    depth = config.get("transformer_layers_per_block", 1)

    def depths(types: list[str], blocks: int) -> list[int]:
        return [depth if kind.startswith("CrossAttn") else 0 for kind in types for _ in range(blocks)]

    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": [layers] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": depths(config["down_block_types"], layers),
        "transformer_depth_output": depths(config["up_block_types"][::-1], layers + 1),
        "transformer_depth_middle": depth,
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def _preview(folder: Path) -> Config:
    """The linear map from latents to colours for live previews; without the file there is no preview."""
    path = folder / "preview.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _predicts(folder: Path) -> ModelType:
    """What the network predicts, as core names it."""
    kind = _config(folder, "scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
    return {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}[kind]


def _description(config: Config, scale: float, preview: Config, predicts: ModelType) -> Any:
    """Core's SD1.5 description with this UNet's heads and this VAE's scale (core's own classes stay as they are)."""

    class PebbleLatent(comfy.latent_formats.LatentFormat):
        scale_factor = scale
        latent_channels = config["in_channels"]
        latent_rgb_factors = preview.get("latent_rgb_factors")
        latent_rgb_factors_bias = preview.get("latent_rgb_factors_bias")

    class Pebble(comfy.supported_models.SD15):
        # diffusers calls the number of heads of SD1.x UNets "attention_head_dim"
        unet_extra_config = {  # noqa: RUF012  (core reads it as a class attribute)
            "num_heads": config.get("num_attention_heads") or config["attention_head_dim"],
            "num_head_channels": -1,
        }
        latent_format = PebbleLatent

        def model_type(self, state_dict: object, prefix: str = "") -> ModelType:
            return predicts

    return Pebble


def _comfy_unet_weights(unet_config: Config, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    names = comfy.utils.unet_to_diffusers(unet_config)
    unknown = [key for key in weights if key not in names]
    if unknown:
        raise InvalidFile(
            f"{folder / 'unet'}: {len(unknown)} weights do not belong to the network that config.json describes "
            f"(the first is '{unknown[0]}'). Take both files from the same training run."
        )
    return {names[key]: value for key, value in weights.items()}


def _config(folder: Path, part: str, name: str = "config.json") -> Config:
    path = folder / part / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InvalidFile(
            f"{path} is missing. Pebble needs the folders {', '.join(WEIGHTS)}, each complete."
        ) from error
    except ValueError as error:
        raise InvalidFile(f"{path} is not valid JSON ({error}). Restore the file.") from error


def _read(folder: Path, part: str) -> tuple[Config, dict[str, Tensor]]:
    config = _config(folder, part)
    path = folder / part / WEIGHTS[part]
    if not path.is_file():
        raise InvalidFile(f"{path} is missing. Pebble's weights ship with this repository; restore the folder.")
    try:
        return config, dict(comfy.utils.load_torch_file(str(path), safe_load=True))
    except Exception as error:
        raise InvalidFile(f"{path} cannot be read ({error}). The file is damaged or incomplete; restore it.") from error
