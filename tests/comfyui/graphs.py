"""Small API graphs for the tests; every test begins with one of these and changes what it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tools.comfyui.server import ComfyError, ComfyServer, RunResult

Graph = dict[str, dict[str, Any]]

STEPS = 4


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def base(index: int = 3) -> Graph:
    """A scene, Pebble, the scene's latent and three prompts."""
    return {
        "scene": node("RetracePebbleScene", index=index, objects=1, margin=0),
        "pebble": node("RetraceLoadPebble"),
        "encode": node("VAEEncode", pixels=["scene", 0], vae=["pebble", 2]),
        "caption": node("CLIPTextEncode", text=["scene", 2], clip=["pebble", 1]),
        "target": node("CLIPTextEncode", text="a blue square", clip=["pebble", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["pebble", 1]),
    }


def sampler(model: str = "pebble", **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": [model, 0],
        "positive": ["target", 0],
        "negative": ["empty", 0],
        "latent_image": ["encode", 0],
        "seed": 5,
        "steps": STEPS,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return node("KSampler", **{**inputs, **changes})


def retracing_sampler(**changes: Any) -> dict[str, Any]:
    """KSampler (Advanced) that walks the inverted noise back under the caption, at cfg 1."""
    inputs = {k: v for k, v in sampler()["inputs"].items() if k not in ("seed", "denoise")}
    inputs |= {"noise_seed": 1, "add_noise": "disable", "start_at_step": 0, "end_at_step": 1000}
    inputs |= {"return_with_leftover_noise": "disable", "positive": ["caption", 0], "cfg": 1.0}
    return node("KSamplerAdvanced", **{**inputs, "latent_image": ["invert", 0], **changes})


def fails(server: ComfyServer, graph: Graph, node_type: str, *words: str) -> None:
    """The run stops at a node of that type with a message that has all ``words``."""
    with pytest.raises(ComfyError) as caught:
        server.run(graph)
    assert caught.value.node_type == node_type, caught.value
    for word in words:
        assert word in str(caught.value), caught.value


def blend(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "mask": ["scene", 1],
        "source": ["encode", 0],
        "noise": "fixed",
        "level": "next",
        "cells": "max",
        "shrink_stages": 0,
        "seed": 7,
    }
    inputs |= changes
    return node("RetraceBlendStep", **{name: value for name, value in inputs.items() if value is not None})


def inverter(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "positive": ["caption", 0],
        "latent": ["encode", 0],
        "steps": STEPS,
        "scheduler": "normal",
        "method": "ddim",
        "tolerance": 0.0,
        "max_iterations": 0,
        "verify": False,
    }
    return node("RetraceDDIMInverter", **{**inputs, **changes})


def solid_mask(value: float, width: int = 128, height: int = 128) -> dict[str, Any]:
    return node("SolidMask", value=value, width=width, height=height)


def blended(index: int = 3, **changes: Any) -> Graph:
    """The base graph with Blend Step and KSampler; both latents are saved."""
    graph = base(index) | {"blend": blend(**changes), "sample": sampler("blend")}
    return graph | {"save": save("sample"), "save_source": save("encode")}


def save(of: str, slot: int = 0) -> dict[str, Any]:
    """Save the latent of a node; :func:`latent` reads it back."""
    return node("SaveLatent", samples=[of, slot], filename_prefix=f"latents/{of}")


def latent(server: ComfyServer, result: RunResult, save_node: str) -> torch.Tensor:
    """The latent that the SaveLatent node ``save_node`` wrote in this run."""
    from safetensors.torch import load_file

    (entry,) = result.outputs[save_node]["latents"]
    path = server.base / "output" / entry["subfolder"] / entry["filename"]
    return load_file(Path(path))["latent_tensor"]


def grid_mask(server: ComfyServer, index: int = 3) -> torch.Tensor:
    """The mask of the scene on the latent grid, ``[1, 1, 16, 16]``."""
    from retrace.masks import latent_mask
    from retrace.models.pebble.scenes import instance_masks, sample_scene, scene_rng

    return latent_mask(instance_masks(sample_scene(scene_rng("heldout", index), 1))[:1])[:, None]
