"""What differs between the ComfyUI versions that are supported, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch


def model_patcher_class(disable_dynamic: bool) -> Any:
    """The patcher that core's loaders use: dynamic VRAM where this ComfyUI has it (2026), the classic one elsewhere."""
    if disable_dynamic:
        return comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def is_dynamic(patcher: Any) -> bool:
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
