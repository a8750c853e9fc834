"""Ordinary tensors in place of inference tensors.

ComfyUI runs nodes under ``torch.inference_mode``, and tensors made there may not take part in autograd later. What a
method of this library sees is therefore always ordinary: aliased where that is safe, copied where it is not.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..common.tensors import change_tensors

__all__ = ["alias", "change_tensors", "result"]

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
