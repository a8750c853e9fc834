"""Blend Step under core's samplers: outside the mask the latent is the source, whatever samples."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def _outside_error(server: ComfyServer, graph: graphs.Graph) -> float:
    """Largest difference to the source outside the scene's mask, in the scale of the latent."""
    result = server.run(graph)
    edited, source = graphs.latent(server, result, "save"), graphs.latent(server, result, "save_source")
    mask = graphs.grid_mask(server)
    assert ((edited - source).abs() * mask).max() > 0.1, "nothing was edited"
    return float(((edited - source).abs() * (1 - mask)).max())


@pytest.mark.parametrize(
    "name", ["euler", "ddim", "heun", "dpmpp_2m_sde", "uni_pc", "euler_ancestral", "lcm", "dpm_fast"]
)
def test_outside_is_the_source_after_every_sampler(server: ComfyServer, name: str) -> None:
    graph = graphs.blended()
    graph["sample"]["inputs"]["sampler_name"] = name
    assert _outside_error(server, graph) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "fresh"},
        {"level": "current"},
        {"cells": "area"},
        {"shrink_stages": 3},
        {"noise": "fresh", "shrink_stages": 2},
    ],
)
def test_outside_is_the_source_with_every_option(newest_server: ComfyServer, changes: dict[str, Any]) -> None:
    assert _outside_error(newest_server, graphs.blended(**changes)) < 1e-5


def test_trajectory_as_background(server: ComfyServer) -> None:
    graph = graphs.blended(source=None, trajectory=["invert", 1], noise="trajectory")
    graph["invert"] = graphs.inverter()
    graph["sample"]["inputs"]["latent_image"] = ["invert", 0]
    graph["sample"] = graphs.node(
        "KSamplerAdvanced",
        **{k: v for k, v in graph["sample"]["inputs"].items() if k not in ("seed", "denoise")},
        noise_seed=1,
        add_noise="disable",
        start_at_step=0,
        end_at_step=1000,
        return_with_leftover_noise="disable",
    )
    assert _outside_error(server, graph) < 1e-5


def test_img2img_start(newest_server: ComfyServer) -> None:
    graph = graphs.blended()
    graph["sample"]["inputs"]["denoise"] = 0.6
    assert _outside_error(newest_server, graph) < 1e-5


def test_with_a_core_noise_mask(newest_server: ComfyServer) -> None:
    graph = graphs.blended()
    graph["masked"] = graphs.node("SetLatentNoiseMask", samples=["encode", 0], mask=["scene", 1])
    graph["sample"]["inputs"]["latent_image"] = ["masked", 0]
    assert _outside_error(newest_server, graph) < 1e-5


def test_custom_sampler_nodes_agree_with_ksampler(server: ComfyServer) -> None:
    graph = graphs.blended()
    graph["ksampler"] = graphs.node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = graphs.node(
        "BasicScheduler", model=["blend", 0], scheduler="normal", steps=graphs.STEPS, denoise=1.0
    )
    shared = {"positive": ["target", 0], "negative": ["empty", 0], "cfg": 4.0, "sampler": ["ksampler", 0]}
    shared |= {"sigmas": ["sigmas", 0], "latent_image": ["encode", 0]}
    graph["custom"] = graphs.node("SamplerCustom", model=["blend", 0], add_noise=True, noise_seed=5, **shared)
    graph["noise"] = graphs.node("RandomNoise", noise_seed=5)
    graph["guider"] = graphs.node(
        "CFGGuider", model=["blend", 0], positive=["target", 0], negative=["empty", 0], cfg=4.0
    )
    graph["advanced"] = graphs.node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["ksampler", 0],
        sigmas=["sigmas", 0], latent_image=["encode", 0],
    )  # fmt: skip
    graph |= {"save_custom": graphs.save("custom"), "save_advanced": graphs.save("advanced")}
    result = server.run(graph)
    expected = graphs.latent(server, result, "save")
    assert torch.equal(expected, graphs.latent(server, result, "save_custom"))
    assert torch.equal(expected, graphs.latent(server, result, "save_advanced"))


def test_full_mask_is_no_blend_at_all(server: ComfyServer) -> None:
    graph = graphs.blended(mask=["all", 0])
    graph["all"] = graphs.solid_mask(1.0)
    graph["plain"] = graphs.sampler()
    graph["save_plain"] = graphs.save("plain")
    result = server.run(graph)
    assert torch.equal(graphs.latent(server, result, "save"), graphs.latent(server, result, "save_plain"))


def test_half_mask_keeps_the_other_half(newest_server: ComfyServer) -> None:
    graph = graphs.blended(mask=["both", 0])
    graph["none"] = graphs.solid_mask(0.0)
    graph["half"] = graphs.solid_mask(1.0, width=64)
    graph["both"] = graphs.node("MaskComposite", destination=["none", 0], source=["half", 0], x=0, y=0, operation="add")
    result = newest_server.run(graph)
    difference = graphs.latent(newest_server, result, "save") - graphs.latent(newest_server, result, "save_source")
    assert difference[..., 8:].abs().max() < 1e-5
    assert difference[..., :8].abs().max() > 0.1


def test_two_blend_steps_keep_what_either_keeps(newest_server: ComfyServer) -> None:
    graph = graphs.blended(model=["first", 0], mask=["both", 0])
    graph["first"] = graphs.blend()
    graph["none"], graph["half"] = graphs.solid_mask(0.0), graphs.solid_mask(1.0, width=64)
    graph["both"] = graphs.node("MaskComposite", destination=["none", 0], source=["half", 0], x=0, y=0, operation="add")
    result = newest_server.run(graph)
    difference = graphs.latent(newest_server, result, "save") - graphs.latent(newest_server, result, "save_source")
    allowed = graphs.grid_mask(newest_server).clone()
    allowed[..., 8:] = 0
    assert (difference.abs() * (1 - allowed)).max() < 1e-5


def test_a_batch_shares_one_source(newest_server: ComfyServer) -> None:
    graph = graphs.blended()
    graph["many"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=3)
    graph["sample"]["inputs"]["latent_image"] = ["many", 0]
    assert _outside_error(newest_server, graph) < 1e-5


def test_seed_decides(newest_server: ComfyServer) -> None:
    def run(seed: int) -> torch.Tensor:
        graph = graphs.blended(seed=seed)
        return graphs.latent(newest_server, newest_server.run(graph), "save")

    first = run(1)
    assert not torch.equal(first, run(2))
    newest_server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")
    assert torch.equal(first, run(1))
