"""Loads Stable Diffusion 1.x, 2.x and XL, from a diffusers folder or one .safetensors file, without the network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InvalidFile, RetraceError, UnsupportedModel, is_out_of_memory, require
from ...models.pebble.weights import weights_folder
from . import configs
from .types import Config, TextModel, Tokenizer, UNet, Vae

_PURPOSE = "run a model without ComfyUI"
_WANTED = "This host runs Stable Diffusion 1.x, 2.x and XL text-to-image models"


@dataclass(frozen=True)
class Parts:
    """A model taken apart: network modules, tokenizers and the scheduler's configuration."""

    unet: UNet
    vae: Vae
    text_encoders: list[TextModel]
    tokenizers: list[Tokenizer]
    scheduler: Mapping[str, Any]


def load_parts(path: Path | None, dtype: torch.dtype) -> Parts:
    """The parts of the model at ``path``, on the CPU; ``None`` is Pebble. The VAE is always float32.

    Raises:
        InvalidFile: nothing is there, a part is missing or cannot be read.
        UnsupportedModel: another architecture, or an inpainting, refiner or instruction variant.
        MissingPackage: diffusers or transformers is not installed.
    """
    require("diffusers", _PURPOSE)
    require("transformers", _PURPOSE)
    unreadable = require("safetensors", _PURPOSE).SafetensorError
    source = weights_folder() if path is None else Path(path).expanduser()
    if not source.exists():
        raise InvalidFile(f"There is no model at {source}. Check the path.")
    # ComfyUI and tests run under inference mode; weights made there could never take part in a backward pass.
    with torch.inference_mode(False), _quietly():
        try:
            parts = _from_folder(source, dtype) if source.is_dir() else _from_file(source, dtype)
        except RetraceError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, unreadable) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InvalidFile(
                f"The model {source} cannot be read: {reason} "
                "Give a complete diffusers folder (with model_index.json) or one .safetensors checkpoint."
            ) from error
    channels = parts.unet.config.in_channels
    if channels != 4:
        kind = {9: "an inpainting model", 8: "an instruction model", 7: "an upscaling model"}.get(
            channels, "another kind"
        )
        raise UnsupportedModel(f"{source.name} takes {channels} channels ({kind}). {_WANTED}, which take 4.")
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        module.eval().requires_grad_(False)
    return parts


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, the two libraries show neither progress bars nor advice: both are about calls that are made here."""
    import diffusers.utils.logging
    import transformers.utils.logging

    logs: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype) -> Parts:
    import diffusers
    import transformers

    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InvalidFile(f"{folder} has no model_index.json. Give the top folder of a model in the diffusers layout.")
    index: Config = json.loads(index_file.read_text(encoding="utf-8"))
    if "transformer" in index or "unet" not in index or "vae" not in index:
        raise UnsupportedModel(f"{folder.name} is a {index.get('_class_name', 'model without a UNet')}. {_WANTED}.")

    def load(cls: Any, part: str, dtype: torch.dtype) -> Any:
        where = folder / part
        plain = (
            any(where.glob("*model.safetensors"))
            or any(where.glob("*model.bin"))
            or any(where.glob("*model*.index.json"))
        )
        variant = None if plain else "fp16"
        return cls.from_pretrained(where, torch_dtype=dtype, variant=variant, local_files_only=True)

    names = [n for n in ("text_encoder", "text_encoder_2") if index.get(n, [None])[0]]
    encoders = [load(getattr(transformers, index[n][1]), n, dtype) for n in names]
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(
            folder / n.replace("text_encoder", "tokenizer"), local_files_only=True
        )
        for n in names
    ]
    if not encoders or not all(e.config.model_type.startswith("clip") for e in encoders):
        raise UnsupportedModel(f"{folder.name} does not read its prompts with CLIP alone. {_WANTED}.")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return Parts(
        unet=load(diffusers.UNet2DConditionModel, "unet", dtype),
        vae=load(diffusers.AutoencoderKL, "vae", torch.float32),
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler=scheduler,
    )


def _from_file(file: Path, dtype: torch.dtype) -> Parts:
    """A checkpoint in the original layout. diffusers converts it; the configuration it would download is ours."""
    import diffusers

    if file.suffix.lower() != ".safetensors":
        raise InvalidFile(
            f"{file.name} is not a .safetensors file. Other formats can run code when they are opened; convert it to "
            ".safetensors, or give a diffusers folder."
        )
    family = configs.detect(file)
    tokenizer = weights_folder() / "tokenizer"  # a single file holds none; the CLIP vocabulary is the same everywhere
    cls = diffusers.StableDiffusionXLPipeline if family.name == "sdxl" else diffusers.StableDiffusionPipeline
    with tempfile.TemporaryDirectory() as folder:
        configs.write(family, tokenizer, Path(folder))
        offline: Config = {"config": folder, "local_files_only": True}
        vae = diffusers.AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=torch.float32, **offline)
        pipe = cls.from_single_file(str(file), vae=vae, torch_dtype=dtype, **offline)
    names = ("text_encoder", "text_encoder_2") if family.name == "sdxl" else ("text_encoder",)
    return Parts(
        unet=pipe.unet,
        vae=vae,
        text_encoders=[getattr(pipe, n) for n in names],
        tokenizers=[getattr(pipe, n.replace("text_encoder", "tokenizer")) for n in names],
        scheduler=family.scheduler,
    )
