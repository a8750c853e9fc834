"""Gradients through ComfyUI's networks.

Loaders run under ``torch.inference_mode``, so weights are inference tensors and autograd refuses to save them. On a
*clone* of the model every layer gets a weight wrapper (core's own extension point) that hands autograd an ordinary
tensor over the same storage. Nothing of the shared model changes; loading the original again removes the wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention
import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..common.tensors import is_quantised
from .compat import drop_inference_buffers, set_in_training
from .plain import alias, change_tensors
from .types import Executor, Model, Options

GRAPH_MEMORY = 3  # memory of a forward pass that is kept for backward, against one that is not


class OrdinaryWeight:
    """A weight wrapper for one parameter of one layer; core calls it with the weight at every forward pass."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        self.module = module
        self.parameter = parameter

    def __call__(self, weight: Tensor) -> Tensor:
        """The layer's own storage while it lies ready on the device; a copy where it could be overwritten.

        Core hands over a temporary copy. Keeping that until the backward pass would hold a second copy of the whole
        model, so it is dropped in favour of the parameter itself. It is kept where the parameter is not what the layer
        computes with: weights in system memory, in pages of dynamic VRAM, of another dtype, or patched on the fly.
        """
        if not torch.is_grad_enabled():
            return weight
        own = getattr(self.module, self.parameter)
        resident = own.device == weight.device and own.dtype == weight.dtype and not hasattr(self.module, "_v")
        if resident and getattr(self.module, f"{self.parameter}_function") == [self]:
            return alias(own.detach())
        return weight.detach().clone()


def gradient_clone(patcher: Model) -> Any:
    """A clone of ``patcher`` whose layers take part in autograd, over the same weights.

    Raises :class:`UnsupportedModel` for quantised weights, whose kernels have no backward.
    """
    clone = patcher.clone()
    for name, module in clone.model.named_modules():
        if not hasattr(module, "weight_function"):
            continue
        for parameter in ("weight", "bias"):
            value = getattr(module, parameter, None)
            if value is None:
                continue
            if is_quantised(value):
                raise UnsupportedModel(
                    f"The layer '{name}' has quantised weights, and gradients cannot pass through them. "
                    "Load the fp16 or bf16 file of this model for methods that optimise."
                )
            clone.add_weight_wrapper(f"{name}.{parameter}", OrdinaryWeight(module, parameter))
    return clone


@contextmanager
def gradient_mode(network: nn.Module) -> Iterator[None]:
    """Autograd on, inference mode off, kernels with a backward chosen; all put back at the end."""
    before = set_in_training(True)
    try:
        drop_inference_buffers()
        with _ordinary_leftovers(network), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if before is not None:
            set_in_training(before)


@contextmanager
def _ordinary_leftovers(network: nn.Module) -> Iterator[None]:
    """Parameters and buffers outside core's layers have no wrapper; they are exchanged for the duration."""
    held: list[tuple[Any, str, Any]] = []
    stores: tuple[Any, ...]
    for module in network.modules():
        if hasattr(module, "weight_function"):
            continue
        stores = (module._parameters, module._buffers)
        for store in stores:
            held += [(store, key, value) for key, value in store.items() if value is not None and value.is_inference()]
    try:
        for store, key, value in held:
            ordinary = alias(value.detach())
            store[key] = nn.Parameter(ordinary, requires_grad=False) if isinstance(value, nn.Parameter) else ordinary
        yield
    finally:
        for store, key, value in held:
            store[key] = value


def differentiable_attention(options: Options) -> None:
    """Make every attention call of ``options`` use PyTorch's: sage, flash and int8 kernels have no backward."""

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    options.setdefault("transformer_options", {})["optimized_attention_override"] = override


class ConstantControl:
    """A ControlNet whose output counts as constant: its weights have no wrapper, so gradients stop at its input."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, x_noisy: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the ControlNet adds to the network's features, as ordinary tensors."""
        with torch.inference_mode():
            features = self._control.get_control(x_noisy.detach(), *args, **kwargs)
        return change_tensors(features, alias)


def constant_controls(conds: Sequence[Any], made: dict[int, ConstantControl]) -> list[Any]:
    """Prepared conditions (lists of entries, or None) whose ControlNets are constants; ``made`` keeps these by theirs.

    One for each ControlNet, because core batches conditions only when they hold the same object.
    """

    def constant(entry: Options) -> dict[str, Any]:
        control = entry.get("control")
        if control is None:
            return entry
        return {**entry, "control": made.setdefault(id(control), ConstantControl(control))}

    return [cond and [constant(entry) for entry in cond] for cond in conds]


def settle_hooks(patcher: Model, conds: Sequence[Any], levels: Tensor, options: Options) -> None:
    """Write the weights of conditions with LoRA hooks now: while autograd is on, core could not.

    Raises :class:`UnsupportedModel` for two different hooks in one graph, which would overwrite weights
    that the first still needs for its backward pass.
    """
    groups = {id(entry.get("hooks")): entry.get("hooks") for cond in conds for entry in cond or []}
    if not any(groups.values()):
        return
    if len(groups) > 1:
        raise UnsupportedModel(
            "Some conditions carry LoRA hooks and others carry none or different ones; gradients cannot pass "
            "through both at once. Apply the LoRA to the model instead, or give every condition the same hooks."
        )
    with torch.inference_mode():
        (hooks,) = groups.values()
        patcher.prepare_hook_patches_current_keyframe(levels, hooks, options)
        patcher.apply_hooks(hooks=hooks)


def reserve_graph_memory(executor: Executor, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    """Around core's preparation of a run: it reserves memory for a forward pass, and a graph takes several times that.

    Core estimates from the batch, so it is shown a larger one.
    """
    return executor(model, [shape[0] * GRAPH_MEMORY, *shape[1:]], *args, **kwargs)
