"""Null-text Optimizer in the real ComfyUI: core's samplers come back with what it makes, and only where they should."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")
CFG = 7.5


def optimizer(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "positive": ["caption", 0],
        "negative": ["empty", 0],
        "trajectory": ["invert", 1],
        "cfg": CFG,
        "mode": "pivotal",
        "inner_steps": 6,
        "learning_rate": 0.01,
        "early_stop": 0.0,
        "parity": False,
        "seed": 0,
    }
    return graphs.node("RetraceNullTextOptimizer", **{**inputs, **changes})


def advanced(negative: list[object], **changes: Any) -> dict[str, Any]:
    return graphs.retracing_sampler(**{"cfg": CFG, "negative": negative, "latent_image": ["null", 2], **changes})


def reconstruction(**changes: Any) -> graphs.Graph:
    graph = graphs.base() | {"invert": graphs.inverter(), "null": optimizer(**changes)}
    graph |= {"sample": advanced(["null", 0]), "save_sample": graphs.save("sample")}
    return graph | {"plain": advanced(["empty", 0]), "save_plain": graphs.save("plain"), "save": graphs.save("encode")}


def _error(server: ComfyServer, result: Any, name: str) -> float:
    back, source = graphs.latent(server, result, name), graphs.latent(server, result, "save")
    return float((back - source).square().mean())


def _found(server: ComfyServer, result: Any) -> float:
    """PSNR in dB of what the sampler came back with, measured as the report does."""
    source = graphs.latent(server, result, "save")
    ratio = float((source.amax() - source.amin()) ** 2) / _error(server, result, "save_sample")
    return float(10 * torch.tensor(ratio).log10())


def _psnr(report: str) -> float:
    return float(report.partition("return, latent")[2].split()[0])


def test_it_comes_back_where_the_plain_negative_does_not(server: ComfyServer) -> None:
    result = server.run(reconstruction())
    assert _error(server, result, "save_sample") < 0.9 * _error(server, result, "save_plain")


def test_the_report_says_what_the_sampler_finds(newest_server: ComfyServer) -> None:
    graph = reconstruction()
    graph["ksampler"] = graphs.node("KSamplerSelect", sampler_name="ddim")
    graph["sample"] = graphs.node(
        "SamplerCustom", model=["pebble", 0], add_noise=False, noise_seed=1, cfg=CFG, positive=["caption", 0],
        negative=["null", 0], sampler=["ksampler", 0], sigmas=["invert", 2], latent_image=["null", 2],
    )  # fmt: skip
    result = newest_server.run(graph)
    report = result.text_of("null")
    assert _psnr(report) == pytest.approx(_found(newest_server, result), abs=0.05)
    for words in (f"pivotal, {graphs.STEPS} steps, 1 image(s), guidance 7.5", "backward passes", "peak memory"):
        assert words in report


def test_the_negative_comes_back_from_a_file(server: ComfyServer) -> None:
    graph = reconstruction()
    graph["keep"] = graphs.node(
        "RetraceSaveInversion", trajectory=["invert", 1], negative=["null", 0], name="with_negative", overwrite=True
    )
    before = graphs.latent(server, server.run(graph), "save_sample")
    graph["load"] = graphs.node("RetraceLoadInversion", name="with_negative", folder="output", model=["pebble", 0])
    graph["sample"]["inputs"] |= {"negative": ["load", 3], "latent_image": ["load", 0]}
    for name in ("invert", "null", "keep", "plain", "save_plain"):
        del graph[name]
    assert torch.equal(before, graphs.latent(server, server.run(graph), "save_sample"))


def test_only_an_optimised_negative_goes_into_the_file(newest_server: ComfyServer) -> None:
    graph = reconstruction()
    graph["keep"] = graphs.node(
        "RetraceSaveInversion", trajectory=["invert", 1], negative=["empty", 0], name="plain", overwrite=True
    )
    graphs.fails(newest_server, graph, "RetraceSaveInversion", "negative: this CONDITIONING was not optimised")
    assert not (newest_server.base / "output" / "plain.safetensors").exists()
    graph["keep"]["inputs"].pop("negative")
    graph["load"] = graphs.node("RetraceLoadInversion", name="plain", folder="output", model=["pebble", 0])
    newest_server.run({k: v for k, v in graph.items() if k != "load"})
    graph["sample"]["inputs"]["negative"] = ["load", 3]
    result = newest_server.run(graph)  # ComfyUI tells the browser why, and does not run what depends on it
    assert "save_sample" not in result.outputs


def test_areas_beside_it_are_refused(newest_server: ComfyServer) -> None:
    """Core gives the positive's area a negative of its own, which would be that of the first step."""
    graph = reconstruction()
    graph["area"] = graphs.node(
        "ConditioningSetArea", conditioning=["caption", 0], width=64, height=64, x=0, y=0, strength=1.0
    )
    graph["sample"]["inputs"]["positive"] = ["area", 0]
    graphs.fails(newest_server, graph, "KSamplerAdvanced", "Null-text Optimizer: an area", "whole image")


def test_the_second_edit_neither_inverts_nor_optimises(server: ComfyServer) -> None:
    graph = reconstruction()
    graph["other"] = graphs.node("CLIPTextEncode", text="a green star", clip=["pebble", 1])
    server.run(graph)
    graph["sample"]["inputs"]["positive"] = ["other", 0]
    edited = server.run(graph)
    assert "sample" in edited.executed_nodes
    assert not {"invert", "null", "encode"} & set(edited.executed_nodes)


def test_the_same_bits_again(newest_server: ComfyServer) -> None:
    """After everything was thrown out."""
    graph = reconstruction(early_stop=1e-5)
    first = graphs.latent(newest_server, newest_server.run(graph), "save_sample")
    newest_server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")
    assert torch.equal(first, graphs.latent(newest_server, newest_server.run(graph), "save_sample"))


def test_a_batch(newest_server: ComfyServer) -> None:
    graph = reconstruction()
    graph["twice"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)
    graph["invert"]["inputs"]["latent"] = ["twice", 0]
    result = newest_server.run(graph)
    back = graphs.latent(newest_server, result, "save_sample")
    assert len(back) == 2 and torch.allclose(back[0], back[1], atol=0.05)
    assert _error(newest_server, result, "save_sample") < 0.9 * _error(newest_server, result, "save_plain")


def test_prompt_mode_gives_the_other_condition(newest_server: ComfyServer) -> None:
    graph = reconstruction(mode="prompt")
    graph["sample"]["inputs"] |= {"positive": ["null", 1]}
    result = newest_server.run(graph)
    # An ablation need not return better than nothing; but what it promises is what the sampler finds.
    assert _psnr(result.text_of("null")) == pytest.approx(_found(newest_server, result), abs=0.05)


def test_the_model_samples_as_before(newest_server: ComfyServer) -> None:
    plain = graphs.base() | {"sample": graphs.sampler(seed=11), "save": graphs.save("sample")}
    before = graphs.latent(newest_server, newest_server.run(plain), "save")
    newest_server.run(reconstruction(inner_steps=2))
    plain["sample"]["inputs"]["seed"] = 12  # not from the cache
    newest_server.run(plain)
    plain["sample"]["inputs"]["seed"] = 11
    plain["save"]["inputs"]["filename_prefix"] = "latents/again"
    assert torch.equal(before, graphs.latent(newest_server, newest_server.run(plain), "save"))


@pytest.mark.usefixtures("trained_pebble")
def test_trained_pebble_returns_within_a_decibel(newest_server: ComfyServer) -> None:
    graph = reconstruction(inner_steps=10, early_stop=1e-5)
    for name in ("invert", "sample", "plain"):
        graph[name]["inputs"]["steps"] = 50
    assert _psnr(newest_server.run(graph).text_of("null")) > 35


class TestRefusals:
    @pytest.mark.parametrize(
        "changes", [{"steps": graphs.STEPS + 1}, {"scheduler": "karras"}, {"sampler_name": "dpm_2"}]
    )
    def test_other_noise_levels(self, server: ComfyServer, changes: dict[str, Any]) -> None:
        graph = reconstruction()
        graph["sample"]["inputs"] |= changes
        graphs.fails(
            server, graph, "KSamplerAdvanced", "Null-text Optimizer: the sampler asks for noise level", "euler"
        )

    def test_a_time_range_set_afterwards(self, newest_server: ComfyServer) -> None:
        graph = reconstruction()
        graph["range"] = graphs.node("ConditioningSetTimestepRange", conditioning=["null", 0], start=0.0, end=1.0)
        graph["sample"]["inputs"]["negative"] = ["range", 0]
        graphs.fails(newest_server, graph, "KSamplerAdvanced", "time range")

    def test_several_prompts(self, newest_server: ComfyServer) -> None:
        graph = reconstruction(negative=["both", 0])
        graph["both"] = graphs.node("ConditioningCombine", conditioning_1=["empty", 0], conditioning_2=["target", 0])
        graphs.fails(newest_server, graph, "RetraceNullTextOptimizer", "Null-text Optimizer: negative: got 2 prompts")

    def test_guidance_one(self, newest_server: ComfyServer) -> None:
        graphs.fails(newest_server, reconstruction(cfg=1.0), "RetraceNullTextOptimizer", "no influence", "7.5")

    def test_another_model(self, newest_server: ComfyServer) -> None:
        graph = reconstruction(model=["v", 0])
        graph["v"] = graphs.node("ModelSamplingDiscrete", model=["pebble", 0], sampling="eps", zsnr=False)
        graphs.fails(newest_server, graph, "RetraceNullTextOptimizer", "made with another model")
