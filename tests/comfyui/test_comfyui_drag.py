"""Dragging in the real ComfyUI: from points to a sampled picture, and input that cannot be."""

from __future__ import annotations

import json
from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")

PAIR = {"handle": [0.5, 0.5], "target": [0.7, 0.5]}


def optimiser(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "positive": ["caption", 0],
        "points": ["points", 0],
        "steps": 6,
        "scheduler": "ddim_uniform",
        "strength": 0.7,
        "mode": "dragdiffusion",
        "mask_mode": "soft",
        "changes": 2,
        "learning_rate": 0.0,
        "mask_weight": -1.0,
        "stop_radius": 2.0,
        "patch_radius": -1,
        "search_radius": -1,
        "feature_block": "auto",
        "inversion": "ddim",
        "latent_is": "picture",
        "cfg": 1.0,
        "save_memory": "auto",
        "parity": False,
        "latent": ["encode", 0],
        "mask": ["points", 1],
        **changes,
    }
    return graphs.node("RetraceDragLatentOptimizer", **{k: v for k, v in inputs.items() if v is not None})


def dragged(points: str = json.dumps([PAIR]), cfg: float = 1.0, **changes: Any) -> graphs.Graph:
    """Points on a scene, the drag, and the rest of the way to pictures."""
    return {
        **graphs.base(),
        "points": graphs.node("RetraceDragPoints", image=["scene", 0], points=points),
        "drag": optimiser(cfg=cfg, **changes),
        "control": graphs.node(
            "RetraceReferenceKVControl", model=["pebble", 0], first_layer=-1, start_percent=0.0, end_percent=1.0
        ),
        "euler": graphs.node("KSamplerSelect", sampler_name="euler"),
        "sample": graphs.node(
            "SamplerCustom",
            model=["control", 0],
            add_noise=False,
            noise_seed=0,
            cfg=cfg,
            positive=["caption", 0],
            negative=["empty", 0],
            sampler=["euler", 0],
            sigmas=["drag", 1],
            latent_image=["drag", 0],
        ),
        "save": graphs.save("sample"),
        "save_start": graphs.save("drag"),
        "report": graphs.node("PreviewAny", source=["drag", 2]),
        "path": graphs.node("PreviewAny", source=["drag", 3]),
        "drawn": graphs.node("PreviewImage", images=["drag", 4]),
    }


@pytest.mark.parametrize("how", [{}, {"mask_mode": "hard"}, {"mode": "gooddrag", "changes": 6}, {"parity": True}])
def test_points_become_a_batch_of_reference_and_edit(server: ComfyServer, how: dict[str, Any]) -> None:
    result = server.run(dragged(**how))
    start, end = (graphs.latent(server, result, name) for name in ("save_start", "save"))
    assert start.shape == end.shape == (2, 4, 16, 16)
    assert torch.isfinite(end).all() and not torch.equal(end[0], end[1])
    assert "network evaluations" in result.outputs["drag"]["text"][0]
    assert result.outputs["drag"]["images"], "the path is drawn on the node"
    way = json.loads(result.outputs["path"]["text"][0])["points"][0]
    assert way["path"][0] == [0.5, 0.5] and len(way["path"]) >= 2
    again = server.run(dragged(**how))
    assert torch.equal(graphs.latent(server, again, "save"), end)


def test_a_trajectory_takes_the_place_of_the_latent(server: ComfyServer) -> None:
    given = dragged(trajectory=["invert", 1], latent=None)
    given["invert"] = graphs.inverter(steps=6, scheduler="ddim_uniform")
    direct = graphs.latent(server, server.run(dragged()), "save_start")
    through = graphs.latent(server, server.run(given), "save_start")
    torch.testing.assert_close(through[0], direct[0], rtol=1e-3, atol=1e-3)


def test_a_generated_picture_is_dragged_on_its_way(server: ComfyServer) -> None:
    graph = dragged(
        cfg=4.0, latent_is="noisy", latent=["begin", 0], negative=["empty", 0], scheduler="normal", changes=1
    )
    begin = graphs.retracing_sampler(steps=6, cfg=4.0, add_noise="enable", end_at_step=2, latent_image=["encode", 0])
    begin["inputs"]["return_with_leftover_noise"] = "enable"
    result = server.run({**graph, "begin": begin, "save_begin": graphs.save("begin")})
    start, given = graphs.latent(server, result, "save_start"), graphs.latent(server, result, "save_begin")
    torch.testing.assert_close(start[:1], given)
    assert torch.isfinite(graphs.latent(server, result, "save")).all()


def test_a_point_that_moves_does_not_train_the_lora_again(server: ComfyServer) -> None:
    def graph(x: float) -> graphs.Graph:
        made = dragged(json.dumps([{**PAIR, "target": [x, 0.5]}]), model=["lora", 0], changes=1)
        training: dict[str, object] = {"rank": 1, "steps": 1, "learning_rate": 5e-4, "batch_size": 1, "seed": 0}
        training |= {"at_once": 1, "save_memory": "auto", "weight_decay": 0.0}
        words = {"model": ["pebble", 0], "positive": ["caption", 0], "latent": ["encode", 0]}
        made["lora"] = graphs.node("RetraceIdentityLoRA", **words, **training)
        made["control"]["inputs"]["model"] = ["lora", 0]
        return made

    assert "lora" in server.run(graph(0.7)).executed_nodes
    moved = server.run(graph(0.71)).executed_nodes
    assert "drag" in moved and "lora" not in moved and "encode" not in moved


def test_the_noise_mask_of_a_latent_says_what_may_change(server: ComfyServer) -> None:
    graph = dragged(mask=None, mask_mode="hard", latent=["masked", 0])
    graph["masked"] = graphs.node("SetLatentNoiseMask", samples=["encode", 0], mask=["scene", 1])
    start = graphs.latent(server, server.run(graph), "save_start")
    outside = (graphs.grid_mask(server) == 0).expand(1, 4, 16, 16)
    assert torch.equal(start[1:][outside], start[:1][outside]) and not torch.equal(start[0], start[1])


def test_what_cannot_be_dragged_is_said(server: ComfyServer) -> None:
    optimiser = "RetraceDragLatentOptimizer"
    graphs.fails(server, dragged(points="[]"), "RetraceDragPoints", "no points")
    graphs.fails(server, dragged(latent=None), optimiser, "nothing to drag", "VAE Encode")
    graphs.fails(server, dragged(cfg=3.0), optimiser, "negative")
    graphs.fails(server, dragged(feature_block="up.3"), optimiser, "up.3", "up.1")
    batch = {**dragged(latent=["batch", 0]), "batch": graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)}
    graphs.fails(server, batch, optimiser, "batch of 2")
    other = {**dragged(mask=["wide", 0]), "wide": graphs.solid_mask(1.0, 256, 128)}
    graphs.fails(server, other, optimiser, "proportions")
    area = dragged(positive=["area", 0])
    area["area"] = graphs.node(
        "ConditioningSetArea", conditioning=["caption", 0], width=64, height=128, x=0, y=0, strength=1.0
    )
    graphs.fails(server, area, optimiser, "positive", "a part of the image")
    late = dragged(positive=["late", 0])
    late["late"] = graphs.node("ConditioningSetTimestepRange", conditioning=["caption", 0], start=0.8, end=1.0)
    graphs.fails(server, late, optimiser, "positive", "a part of the steps")
    graphs.fails(server, dragged(latent_is="noisy"), optimiser, "noise level", "leftover noise")
    both = dragged(trajectory=["invert", 1], sigmas=["levels", 0])
    schedule = {"model": ["pebble", 0], "scheduler": "normal", "steps": 6, "denoise": 1.0}
    both |= {"invert": graphs.inverter(steps=6), "levels": graphs.node("BasicScheduler", **schedule)}
    graphs.fails(server, both, optimiser, "sigmas", "trajectory")
    sampled = dragged()
    sampled["one"] = graphs.node("LatentFromBatch", samples=["drag", 0], batch_index=1, length=1)
    sampled["sample"]["inputs"]["latent_image"] = ["one", 0]
    graphs.fails(server, sampled, "SamplerCustom", "batch [reference, edit, ...]")
