"""CLIP Guidance in the real ComfyUI: in a graph, beside Blend Step, and with input that cannot be."""

from __future__ import annotations

import io
from typing import Any

import graphs
import numpy
import pytest
import torch
from PIL import Image

from retrace.models.pebble.scenes import instance_masks, sample_scene, scene_rng
from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def guided(*, blend: bool = True, sampler: dict[str, Any] | None = None, **changes: Any) -> graphs.Graph:
    """The scene's object guided to a blue square, the sampler without words."""
    inputs = {
        "model": ["blend" if blend else "pebble", 0],
        "clip": ["clip", 0],
        "prompt": "a blue square",
        "strength": 300.0,
        "gradient": "x0",
        "view": "region",
        "augmentations": 2,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "every": 1,
        "seed": 0,
        "mask": ["scene", 1],
        "vae": ["pebble", 2],
        "range": 50.0,
        "background_mse": 0.0,
        "background_lpips": 0.0,
        "dsg": 0.0,
        "parity": False,
        **changes,
    }
    return {
        **graphs.base(),
        "clip": graphs.node("RetraceLoadCLIP", model="Pebble's CLIP", architecture="ViT-B-32-quickgelu"),
        "blend": graphs.blend(),
        "guide": graphs.node("RetraceCLIPGuidance", **{k: v for k, v in inputs.items() if v is not None}),
        "sample": graphs.sampler("guide", positive=["empty", 0], cfg=1.0, **(sampler or {})),
        "decode": graphs.node("VAEDecode", samples=["sample", 0], vae=["pebble", 2]),
        "paste": graphs.node(
            "RetracePasteBackground", edited=["decode", 0], source=["scene", 0], mask=["scene", 1], feather=3.0
        ),
        "save": graphs.node("SaveImage", images=["paste", 0], filename_prefix="retrace"),
    }


def picture(server: ComfyServer, graph: graphs.Graph) -> torch.Tensor:
    """What the graph saves, ``[H, W, 3]`` in 8 bits."""
    (saved,) = server.run(graph).images_of("save")
    with Image.open(io.BytesIO(saved.read())) as image:
        return torch.from_numpy(numpy.asarray(image.convert("RGB")).copy())


@pytest.mark.parametrize("gradient", ["x0", "full"])
def test_it_edits_inside_the_mask_only_and_again_the_same(server: ComfyServer, gradient: str) -> None:
    one = picture(server, guided(gradient=gradient))
    weaker = picture(server, guided(gradient=gradient, strength=1.0))
    changed = (one != weaker).any(-1)
    assert bool(changed.any())
    before = picture(
        server,
        {
            "scene": graphs.node("RetracePebbleScene", index=3, objects=1, margin=0),
            "save": graphs.node("SaveImage", images=["scene", 0], filename_prefix="retrace"),
        },
    )
    outside = instance_masks(sample_scene(scene_rng("heldout", 3), 1))[0] == 0
    assert torch.equal(one[outside], before[outside])
    server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")
    assert torch.equal(picture(server, guided(gradient=gradient)), one)


def test_without_blend_step_without_a_vae_with_dsg(server: ComfyServer) -> None:
    pictures = [
        picture(server, guided(blend=False, background_mse=1000.0, source=["scene", 0])),
        picture(server, guided(vae=None)),
        picture(server, guided(dsg=0.5, gradient="full", every=2)),
        picture(server, guided(parity=True, sampler={"sampler_name": "dpmpp_2m_sde"})),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[i + 1 :])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " "}, ("CLIP Guidance: prompt", "empty")),
        ({"background_mse": 1.0}, ("background", "Give both")),
        ({"strength": 0.0, "range": 0.0}, ("nothing to guide",)),
        ({"background_lpips": 1.0, "source": ["scene", 0]}, ("vgg16", "download", "folder")),
        ({"mask": None, "background_mse": 1.0, "source": ["scene", 0]}, ("Give both",)),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    newest_server: ComfyServer, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    graphs.fails(newest_server, guided(**changes), "RetraceCLIPGuidance", *words)
