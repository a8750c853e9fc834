"""Low-rank changes of linear maps while a network runs; the weights themselves stay as they are, in whatever form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ...core.host import LowRank


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """``(outputs, inputs)`` of a linear layer, as its configuration says: the weight itself may be anywhere."""
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


@contextmanager
def adapted(layers: Mapping[str, nn.Module], adapters: Mapping[str, LowRank], device: torch.device) -> Iterator[None]:
    """Inside, each layer that has an adapter gives ``y + up(down(x))``, computed in the type of ``x``.

    Raises :class:`UnsupportedModel` for an adapter that fits no layer.
    """
    for name, adapter in adapters.items():
        _check(name, adapter, layers.get(name))
    handles = []
    try:
        for name, adapter in adapters.items():
            down, up = _ordinary(adapter.down, device), _ordinary(adapter.up, device)
            handles.append(layers[name].register_forward_hook(_hook(down, up)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ordinary(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``; a copy of an inference tensor, which autograd could not keep."""
    if not tensor.is_inference():
        return tensor.to(device)
    with torch.inference_mode(False):
        return tensor.to(device, copy=True)


def _hook(down: Tensor, up: Tensor) -> Any:
    def change(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return output + F.linear(F.linear(x, down.to(x)), up.to(x))

    return change


def _check(name: str, adapter: LowRank, layer: nn.Module | None) -> None:
    advice = "It was trained on a model of another kind. Train it again on the model that is connected here."
    if layer is None:
        raise UnsupportedModel(f"The LoRA changes '{name}', which this model does not have. {advice}")
    outputs, inputs = shape_of(layer)
    up, down = tuple(adapter.up.shape), tuple(adapter.down.shape)
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or (up[0], down[1]) != (outputs, inputs):
        raise UnsupportedModel(
            f"The LoRA changes '{name}' by {list(up)} x {list(down)}, but this model has {outputs} outputs and "
            f"{inputs} inputs there. {advice}"
        )
