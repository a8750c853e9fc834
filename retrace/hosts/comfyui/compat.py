"""What differs between the ComfyUI versions that are supported, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .types import Model, Network


def model_patcher_class(disable_dynamic: bool) -> Any:
    """The patcher that core's loaders use: dynamic VRAM where this ComfyUI has it (2026), the classic one elsewhere."""
    if disable_dynamic:
        return comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def is_dynamic(patcher: Model) -> bool:
    """Whether weights live in pages that ComfyUI may reuse while a graph still needs them."""
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def accepted(function: Any, **options: Any) -> dict[str, Any]:
    """Those ``options`` that this version's ``function`` takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def build_clip(target: Any, state_dict: dict[str, torch.Tensor], parameters: int, **options: Any) -> Any:
    """A ``comfy.sd.CLIP`` with its weights; older versions take the weights in a second step."""
    known = accepted(comfy.sd.CLIP.__init__, state_dict=state_dict, **options)
    clip = comfy.sd.CLIP(target, parameters=parameters, **known)
    if "state_dict" not in known:
        clip.load_sd(state_dict, full_model=True)
    return clip


def set_in_training(active: bool) -> bool | None:
    """Ask core for kernels that have a backward; returns the value before, or None where core has no such switch."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is not None:
        comfy.model_management.in_training = active
    return before


def drop_inference_buffers() -> None:
    """Let core make new transfer buffers: those it made in inference mode cannot be written while autograd is on.

    Only partly loaded models use them (2026 and later), and core makes them again where they are missing.
    """
    buffers = getattr(comfy.model_management, "STREAM_CAST_BUFFERS", {})
    for stream in [stream for stream, buffer in buffers.items() if buffer.is_inference()]:
        if hasattr(stream, "synchronize"):
            stream.synchronize()
        del buffers[stream]


def runtime_state(network: Network) -> dict[int, Any]:
    """What core keeps on the layers of ``network`` while they are loaded, as things not to copy with it.

    For the memo of :func:`copy.deepcopy`: pages of dynamic VRAM, pinned memory, functions that patch a weight.
    :func:`free_of_patches` then removes the names from the copy.
    """
    atoms = (bool, int, float, str, bytes, type(None), type)
    return {
        id(value): ()
        for module in network.modules()
        for name, value in vars(module).items()
        if _is_runtime_state(name) and not isinstance(value, atoms)
    }


def free_of_patches(network: Network) -> None:
    """Make the layers of a copied ``network`` compute with their own weights, as those of a model nobody loaded."""
    for module in network.modules():
        for name in [name for name in vars(module) if _is_runtime_state(name)]:
            delattr(module, name)
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = False


def _is_runtime_state(name: str) -> bool:
    return name.startswith(("_v", "_pin", "_prefetch", "dynamic_pins")) or name.endswith(
        ("weight_function", "bias_function", "_lowvram_function")
    )
