"""Ordinary tensors in place of inference tensors.

ComfyUI runs nodes under ``torch.inference_mode``, and tensors made there may not take part in autograd later. What a
method of this library sees is therefore always ordinary: aliased where that is safe, copied where it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the same storage, free of charge; ``tensor`` itself when it is ordinary already."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def result(value: T, device: torch.device) -> T:
    """``value`` with every tensor in it detached, ordinary and on ``device``; containers, dataclasses are rebuilt."""
    return change_tensors(value, lambda tensor: alias(tensor.detach()).to(device))  # type: ignore[no-any-return]


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor inside it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, change_tensors(item, change)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(change_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: change_tensors(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **fields)
    return value
