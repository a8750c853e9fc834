"""Files with the weights of image-text models: where they are, what they hold. Nothing is ever downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...core.errors import InvalidFile, is_out_of_memory, require

Facts: TypeAlias = dict[str, Any]
"""What open_clip knows about a pretrained model, or a configuration of one."""

ClipNetwork: TypeAlias = Any
"""An ``open_clip.CLIP``, whose package may not be installed."""

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin")
"""Of files with weights."""

_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in old files beside the weights


def find_weights(architecture: str, tag: str, facts: Facts, folders: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """The file of a pretrained model: ``<architecture>-<tag>`` in one of ``folders``, or in Hugging Face's cache.

    ``facts`` are open_clip's about it. Raises InvalidFile, which names the file, the folder and where it comes from.
    """
    places = [Path(folder) for folder in folders]
    named = (place / f"{architecture}-{tag}{suffix}" for place in places for suffix in SUFFIXES)
    for file in named:
        if file.is_file():
            return file
    repository, _, own_name = str(facts.get("hf_hub", "")).rpartition("/")
    hub_files = (own_name,) if own_name else _HUB_FILES
    if repository:
        hub = require("huggingface_hub", "look for downloaded models")
        for name in hub_files:
            cached = hub.try_to_load_from_cache(repository, name)
            if isinstance(cached, str) and Path(cached).is_file():
                return Path(cached)
    source = f"https://huggingface.co/{repository}/resolve/main/{hub_files[0]}" if repository else facts.get("url")
    wanted = f"{architecture}-{tag}{Path(hub_files[0]).suffix}"
    where = f"no file '{wanted}' in the folder '{places[0]}'" if places else "they are not in Hugging Face's cache"
    then = f"save it there as '{wanted}'" if places else "name that file instead"
    raise InvalidFile(
        f"The weights of '{architecture}/{tag}' are missing: {where}, and nothing is downloaded by itself. Download "
        f"{source} and {then}, or choose another model."
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name. Raises InvalidFile: missing, damaged, or a program."""
    if not file.is_file():
        raise InvalidFile(f"There is no file '{file.name}' in the folder '{file.parent}'. Check the name.")
    try:
        if file.suffix.lower() in (".safetensors", ".sft"):
            from safetensors.torch import load_file

            return load_file(file)
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage is answered with RuntimeError, EOFError, UnpicklingError, SafetensorError, ...
        if is_out_of_memory(error):
            raise
        raise InvalidFile(
            f"'{file.name}' cannot be read as a file of weights ({(str(error) or repr(error)).splitlines()[0]}). Take "
            "the .safetensors of the same model: OpenAI's own .pt files are programs, which are not run here."
        ) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return {str(name).removeprefix("module."): value for name, value in stored.items() if isinstance(value, Tensor)}


def fill(model: ClipNetwork, stored: Mapping[str, Tensor], file: Path, architecture: str) -> None:
    """Give an open_clip model all of its weights. Raises InvalidFile: some are missing, of another size or too many."""
    own = model.state_dict()
    advice = f"Choose the architecture that the file holds, or a file for {architecture} in open_clip's form."
    missing = [name for name in own if name not in stored]
    if missing:
        kind = _foreign(stored)
        raise InvalidFile(
            f"'{file.name}' does not hold the model {architecture}: {len(missing)} of {len(own)} weights are missing, "
            f"'{missing[0]}' first.{kind} {advice}"
        )
    differ = [name for name, value in own.items() if _differ(stored[name], value)]
    other = [f"'{n}' is {list(stored[n].shape)} instead of {list(own[n].shape)}" for n in differ]
    other += [f"'{name}' has no place" for name in stored if name not in own and name not in _NO_WEIGHTS]
    if other:
        raise InvalidFile(f"'{file.name}' does not fit the architecture {architecture}: {other[0]}. {advice}")
    model.load_state_dict({name: stored[name].reshape(value.shape) for name, value in own.items()})


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape and (one.numel() > 1 or other.numel() > 1)  # logit_scale: [] or [1]


def _foreign(stored: Mapping[str, Tensor]) -> str:
    names = " ".join(stored)
    towers = [side for side, prefix in (("image", "vision_model."), ("text", "text_model.")) if prefix in names]
    if len(towers) == 2:
        return " It is in the form of transformers."
    return f" It holds only the {towers[0]} side of a CLIP." if towers else ""
