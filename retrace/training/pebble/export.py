"""Write the trained networks as a diffusers folder in fp16, with the card beside them."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.pebble import architecture
from ..stage import write_json
from . import text_tower


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()}


def save(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half(state), path, metadata={"format": "pt"})


def write_vae(folder: Path, vae: nn.Module, scaling_factor: float) -> None:
    save(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", **architecture.VAE, "scaling_factor": scaling_factor}
    write_json(folder / "vae" / "config.json", config)


def write_clip(folder: Path, clip: nn.Module) -> None:
    """What open_clip needs beyond the text tower, in ``clip/``."""
    rest = {
        k: v for k, v in clip.state_dict().items() if k.startswith("visual.") or k in ("text_projection", "logit_scale")
    }
    save(rest, folder / "clip" / "open_clip_model.safetensors")
    write_json(folder / "clip" / "open_clip_config.json", {"model_cfg": architecture.CLIP})


def write_text_encoder(folder: Path, tower: nn.Module) -> None:
    save(text_tower.to_ship(tower), folder / "text_encoder" / "model.safetensors")
    write_json(folder / "text_encoder" / "config.json", text_tower.config())


def write_unet(folder: Path, unet: nn.Module) -> None:
    save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **architecture.UNET})


def read_shipped(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The states of ``unet`` and ``text`` in ``folder``, in float32."""
    from safetensors.torch import load_file

    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {name.removeprefix("text_model."): weight for name, weight in text.items()}
    return {part: {k: v.float() for k, v in state.items()} for part, state in {"unet": unet, "text": text}.items()}


def write_tokenizer(folder: Path) -> None:
    """CLIP's byte-pair vocabulary (MIT, Radford et al. 2021), read from the copy inside open_clip."""
    import gzip

    import open_clip.tokenizer as source

    with gzip.open(source.default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(source.bytes_to_unicode().values())
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    target = folder / "tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({t: i for i, t in enumerate(vocabulary)}, ensure_ascii=False)
    (target / "vocab.json").write_text(text, encoding="utf-8", newline="\n")
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8", newline="\n")
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": architecture.CLIP["text_cfg"]["context_length"],
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "do_lower_case": True,
        },
    )


def write_pipeline(folder: Path) -> None:
    """The files that make the folder a StableDiffusionPipeline."""
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **architecture.SCHEDULER}
    )
    nothing = [None, None]
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": version("diffusers"),
            "feature_extractor": nothing,
            "image_encoder": nothing,
            "requires_safety_checker": False,
            "safety_checker": nothing,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_preview(folder: Path, latents: Tensor, images: Tensor) -> None:
    """The linear map from latents ``[N, 4, 16, 16]`` (unit variance) to RGB in -1..1 that live previews use."""
    colours = F.avg_pool2d(images.float() / 127.5 - 1, architecture.DOWNSCALE)
    rows = latents.movedim(1, -1).flatten(0, -2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, colours.movedim(1, -1).flatten(0, -2)).solution
    factors = [[round(v, 4) for v in row] for row in solution.tolist()]
    write_json(folder / "preview.json", {"latent_rgb_factors": factors[:-1], "latent_rgb_factors_bias": factors[-1]})


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """The card of what was trained now; what it says of the other stages stays."""
    path = folder / "card.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**before, **card})
