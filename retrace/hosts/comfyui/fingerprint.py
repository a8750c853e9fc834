"""Recognise a model by a sample of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .types import Model

TENSORS = 24  # weights that are looked at, spread over the network
VALUES = 64  # values of each


def fingerprint(patcher: Model) -> str:
    """16 hexadecimal digits: equal for the same checkpoint, LoRAs and prediction, in every session.

    Hashes the names and shapes of all weights, sampled values of some as the file holds them (without what a LoRA has
    baked in), every patch with its strength, and the noise levels. Values are compared as fp16, so that it makes no
    difference whether the file was loaded as fp16 or fp32; bf16 weights make another fingerprint. Patches of attention
    or sampling are not part of it.
    """
    digest = hashlib.sha256()
    weights = {key: value for key, value in patcher.model_state_dict().items() if key.startswith("diffusion_model.")}
    names = sorted(weights)
    for name in names:
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
    for name in _spread([name for name in names if weights[name].is_floating_point()], TENSORS):
        backup = patcher.backup.get(name)  # holds the original while a LoRA is baked into the loaded weight
        digest.update(_values(weights[name] if backup is None else backup.weight))
    for name in sorted(patcher.patches):
        for strength, patch, base_strength, *_ in patcher.patches[name]:
            digest.update(f"{name} {float(strength):.6g} {float(base_strength):.6g}".encode())
            for tensor in _spread(list(_tensors(patch)), 2):
                digest.update(str(tuple(tensor.shape)).encode())
    for name in _spread(sorted(patcher.patches), TENSORS):
        for _, patch, *_ in patcher.patches[name]:
            for tensor in _tensors(patch):
                digest.update(_values(tensor))
    sampling = patcher.get_model_object("model_sampling")
    digest.update(type(sampling).calculate_denoised.__qualname__.encode())
    digest.update(_values(sampling.sigmas))
    return digest.hexdigest()[:16]


def _values(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(VALUES, flat.numel()), dtype=torch.float64).round().long()
    sample = flat[index.to(flat.device)].to("cpu", torch.float32).to(torch.float16)
    return sample.numpy().tobytes()


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly spaced."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _tensors(patch: Any) -> Iterator[Tensor]:
    """The tensors of one weight patch, in whatever form core or another pack keeps it."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (list, tuple)):
        for item in patch:
            yield from _tensors(item)
    elif hasattr(patch, "weights"):  # core's adapter objects
        yield from _tensors(patch.weights)
