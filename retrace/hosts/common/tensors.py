"""Tensors inside of whatever a method takes or returns: containers and dataclasses are rebuilt around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


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


def is_quantised(value: Any) -> bool:
    """Whether a weight is stored in fewer bits than it computes with, in kernels without a backward."""
    return "Quantized" in type(value).__name__ or "Quantized" in type(getattr(value, "data", None)).__name__
