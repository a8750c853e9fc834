"""Edit-friendly Inverter in the real ComfyUI: SamplerCustom returns the picture, and edits it with other words."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch

from retrace.inversion.invert import latent_psnr
from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")
STEPS = 6
CFG = 3.5
NODE = "RetraceEditFriendlyInverter"


def inverter(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "positive": ["caption", 0],
        "negative": ["empty", 0],
        "latent": ["encode", 0],
        "steps": STEPS,
        "scheduler": "normal",
        "source_cfg": CFG,
        "skip": 0.36,
        "seed": 3,
        "batch": 4,
    }
    return graphs.node(NODE, **{**inputs, **changes})


def custom(**changes: Any) -> dict[str, Any]:
    return graphs.node(
        "SamplerCustom", **{
            "model": ["pebble", 0], "add_noise": False, "noise_seed": 1, "cfg": CFG, "positive": ["caption", 0],
            "negative": ["empty", 0], "sampler": ["invert", 3], "sigmas": ["invert", 2],
            "latent_image": ["invert", 0], **changes,
        },
    )  # fmt: skip


def reconstruction(**changes: Any) -> graphs.Graph:
    graph = graphs.base() | {"invert": inverter(**changes), "sample": custom()}
    graph["edit"] = custom(positive=["target", 0], cfg=7.5)
    return graph | {f"save_{name}": graphs.save(name) for name in ("sample", "edit", "encode")}


def _psnr(server: ComfyServer, result: Any, name: str) -> float:
    source = graphs.latent(server, result, "save_encode")
    back = graphs.latent(server, result, name)
    return latent_psnr(back, source.repeat(len(back) // len(source), 1, 1, 1))


@pytest.mark.parametrize("skip", [0.0, 0.36, 1.0])
def test_the_same_words_return_the_picture(server: ComfyServer, skip: float) -> None:
    result = server.run(reconstruction(skip=skip))
    assert _psnr(server, result, "save_sample") > 60
    if skip < 1:
        assert _psnr(server, result, "save_edit") < 60


def test_the_report_says_what_it_cost(newest_server: ComfyServer) -> None:
    text = newest_server.run(reconstruction(skip=0.5)).text_of("invert")
    left = STEPS // 2
    assert f"edit_friendly, {left} steps, 1 image(s), guidance {CFG:g}, seed 3" in text
    assert f"{2 * left} network evaluations, {left} steps at a time" in text
    assert "strength of the noises" in text and "peak memory" in text


def test_other_words_neither_invert_again_nor_change_the_model(newest_server: ComfyServer) -> None:
    plain = graphs.base() | {"sample": graphs.sampler(seed=11), "save": graphs.save("sample")}
    before = graphs.latent(newest_server, newest_server.run(plain), "save")
    graph = reconstruction(skip=0.2)
    graph["other"] = graphs.node("CLIPTextEncode", text="a green star", clip=["pebble", 1])
    newest_server.run(graph)
    graph["edit"]["inputs"]["positive"] = ["other", 0]
    result = newest_server.run(graph)
    assert "edit" in result.executed_nodes and not {"invert", "encode"} & set(result.executed_nodes)
    plain["sample"]["inputs"]["seed"] = 12  # not from the cache
    newest_server.run(plain)
    plain["sample"]["inputs"]["seed"] = 11
    plain["save"]["inputs"]["filename_prefix"] = "latents/again"
    assert torch.equal(before, graphs.latent(newest_server, newest_server.run(plain), "save"))


def test_the_same_bits_again_and_others_with_another_seed(newest_server: ComfyServer) -> None:
    graph = reconstruction()
    first = graphs.latent(newest_server, newest_server.run(graph), "save_edit")
    newest_server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")
    assert torch.equal(first, graphs.latent(newest_server, newest_server.run(graph), "save_edit"))
    result = newest_server.run(reconstruction(seed=4))
    assert not torch.equal(first, graphs.latent(newest_server, result, "save_edit"))
    assert _psnr(newest_server, result, "save_sample") > 60


def test_batches(newest_server: ComfyServer) -> None:
    """Two pictures inverted, four sampled; and all steps in one call or one by one."""
    graph = reconstruction(latent=["twice", 0], batch=1)
    graph["twice"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)
    graph["four"] = graphs.node("RepeatLatentBatch", samples=["invert", 0], amount=2)
    graph["sample"]["inputs"]["latent_image"] = ["four", 0]
    result = newest_server.run(graph)
    assert len(graphs.latent(newest_server, result, "save_sample")) == 4
    assert _psnr(newest_server, result, "save_sample") > 60


def test_own_sigmas_and_a_guider(newest_server: ComfyServer) -> None:
    graph = reconstruction(sigmas=["schedule", 0], skip=0.5)
    graph["schedule"] = graphs.node(
        "RetraceReferenceSchedule", model=["pebble", 0], grid="leading_1", steps=8, parity=False
    )
    graph["guider"] = graphs.node(
        "CFGGuider", model=["pebble", 0], positive=["caption", 0], negative=["empty", 0], cfg=CFG
    )
    graph["none"] = graphs.node("DisableNoise")
    graph["sample"] = graphs.node(
        "SamplerCustomAdvanced", noise=["none", 0], guider=["guider", 0], sampler=["invert", 3], sigmas=["invert", 2],
        latent_image=["invert", 0],
    )  # fmt: skip
    result = newest_server.run(graph)
    assert "edit_friendly, 4 steps" in result.text_of("invert")
    assert _psnr(newest_server, result, "save_sample") > 60


def test_its_trajectory_survives_a_file_and_serves_the_blend(newest_server: ComfyServer) -> None:
    graph = reconstruction()
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="noised", overwrite=True)
    graph["blend"] = graphs.blend(noise="trajectory", trajectory=["invert", 1], source=None)
    graph["edit"]["inputs"]["model"] = ["blend", 0]
    result = newest_server.run(graph)
    outside = graphs.grid_mask(newest_server).expand(1, 4, 16, 16) == 0
    edited, source = (graphs.latent(newest_server, result, f"save_{name}") for name in ("edit", "encode"))
    assert torch.allclose(edited[outside], source[outside], atol=1e-4)
    graph = graphs.base() | {"sample": custom(), "save_encode": graphs.save("encode"), "invert": inverter()}
    graph["load"] = graphs.node("RetraceLoadInversion", name="noised", folder="output", model=["pebble", 0])
    graph["sample"]["inputs"] |= {"latent_image": ["load", 0], "sigmas": ["load", 2]}
    graph["save_sample"] = graphs.save("sample")
    assert _psnr(newest_server, newest_server.run(graph), "save_sample") > 60


def test_flow_models_come_back_through_core(newest_server: ComfyServer) -> None:
    graph = reconstruction(model=["flow", 0], skip=0.0)
    graph["flow"] = graphs.node("ModelSamplingSD3", model=["pebble", 0], shift=1.0)
    for name in ("sample", "edit"):
        graph[name]["inputs"]["model"] = ["flow", 0]
    assert _psnr(newest_server, newest_server.run(graph), "save_sample") > 50


class TestRefusals:
    def test_other_noise_levels(self, server: ComfyServer) -> None:
        graph = reconstruction()
        graph["other"] = graphs.node(
            "BasicScheduler", model=["pebble", 0], scheduler="karras", steps=STEPS, denoise=1.0
        )
        graph["sample"]["inputs"]["sigmas"] = ["other", 0]
        words = ("Edit-friendly Inverter: The sampler asks for 6 step(s)", "Sample with the sigmas of the inversion")
        graphs.fails(server, graph, "SamplerCustom", *words)

    def test_another_size_or_batch(self, newest_server: ComfyServer) -> None:
        graph = reconstruction()
        graph["large"] = graphs.node("EmptyLatentImage", width=256, height=128, batch_size=1)
        graph["sample"]["inputs"]["latent_image"] = ["large", 0]
        graphs.fails(newest_server, graph, "SamplerCustom", "Edit-friendly Inverter", "[1, 4, 16, 16]")

    def test_noise_on_top(self, newest_server: ComfyServer) -> None:
        graph = reconstruction()
        graph["sample"]["inputs"]["add_noise"] = True
        graphs.fails(newest_server, graph, "SamplerCustom", "Edit-friendly Inverter", "Switch add_noise off")

    def test_a_noise_mask(self, newest_server: ComfyServer) -> None:
        graph = reconstruction()
        graph["masked"] = graphs.node("SetLatentNoiseMask", samples=["invert", 0], mask=["scene", 1])
        graph["sample"]["inputs"]["latent_image"] = ["masked", 0]
        graphs.fails(newest_server, graph, "SamplerCustom", "Edit-friendly Inverter", "Blend Step")

    def test_sigmas_that_ascend(self, newest_server: ComfyServer) -> None:
        graph = reconstruction(sigmas=["flip", 0])
        graph["schedule"] = graphs.node(
            "BasicScheduler", model=["pebble", 0], scheduler="normal", steps=STEPS, denoise=1.0
        )
        graph["flip"] = graphs.node("FlipSigmas", sigmas=["schedule", 0])
        graphs.fails(newest_server, graph, NODE, "Edit-friendly Inverter: sigmas:", "Flip Sigmas")

    def test_a_latent_of_another_model(self, newest_server: ComfyServer) -> None:
        graph = reconstruction(latent=["wide", 0])
        graph["wide"] = graphs.node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        graphs.fails(newest_server, graph, NODE, "Edit-friendly Inverter: latent:", "16 channels")
