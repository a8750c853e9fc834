"""Identity LoRA in the real ComfyUI: core's nodes take what it makes, it trains once, and nothing else changes."""

from __future__ import annotations

import shutil
from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.install import ComfyError
from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")
NODE = "RetraceIdentityLoRA"


def lora(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "positive": ["caption", 0],
        "latent": ["encode", 0],
        "rank": 4,
        "steps": 4,
        "learning_rate": 0.01,
        "batch_size": 2,
        "seed": 0,
        "at_once": 2,
        "save_memory": "auto",
        "weight_decay": 0.01,
    }
    return graphs.node(NODE, **{**inputs, **changes})


def sampled(**changes: Any) -> graphs.Graph:
    """One sample with the LoRA, one without, from the same noise."""
    graph = graphs.base() | {"lora": lora(**changes), "sample": graphs.sampler("lora"), "save": graphs.save("sample")}
    return graph | {"plain": graphs.sampler(), "save_plain": graphs.save("plain")}


def save_node(server: ComfyServer) -> str:
    """Core's Save LoRA Weights, whose id has changed."""
    return "SaveLoRA" if "SaveLoRA" in server.object_info() else "SaveLoRANode"


def test_core_saves_loads_and_plots_it(server: ComfyServer) -> None:
    graph = sampled()
    graph["file"] = graphs.node(save_node(server), lora=["lora", 1], prefix="loras/identity", steps=4)
    graph["plot"] = graphs.node("LossGraphNode", loss=["lora", 2], filename_prefix="loss")
    bypass = "bypass" in server.object_info()["LoraModelLoader"]["input"].get("required", {})
    graph["load"] = graphs.node(
        "LoraModelLoader",
        model=["pebble", 0],
        lora=["lora", 1],
        strength_model=1.0,
        **({"bypass": False} if bypass else {}),
    )
    graph |= {"loaded": graphs.sampler("load"), "save_loaded": graphs.save("loaded")}
    result = server.run(graph)
    with_lora, without = (graphs.latent(server, result, name) for name in ("save", "save_plain"))
    assert float((with_lora - without).abs().mean()) > 0.01
    assert torch.equal(with_lora, graphs.latent(server, result, "save_loaded"))
    assert result.outputs["plot"]["images"] and result.outputs["lora"]["images"]
    report = result.text_of("lora")
    for words in ("rank 4, 4 steps of 2 noise levels", "8 fixed noise levels", "24 network evaluations, 8 backward"):
        assert words in report
    (written,) = (server.base / "output" / "loras").glob("identity*.safetensors")
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(written, folder / "identity.safetensors")
    again = graphs.base()
    again["load"] = graphs.node(
        "LoraLoaderModelOnly", model=["pebble", 0], lora_name="identity.safetensors", strength_model=1.0
    )
    again |= {"sample": graphs.sampler("load"), "save": graphs.save("sample")}
    assert torch.equal(with_lora, graphs.latent(server, server.run(again), "save"))


def test_it_trains_once(server: ComfyServer) -> None:
    graph = sampled(seed=3)
    assert "lora" in server.run(graph).executed_nodes
    graph["sample"]["inputs"] |= {"seed": 6, "steps": 3, "positive": ["caption", 0]}
    edited = server.run(graph)
    assert "sample" in edited.executed_nodes
    assert not {"lora", "encode"} & set(edited.executed_nodes)
    graph["lora"]["inputs"]["seed"] = 4
    assert "lora" in server.run(graph).executed_nodes


def test_the_same_bits_again_and_the_model_as_before(newest_server: ComfyServer) -> None:
    """After everything was thrown out; the plain sample comes after the training in one run and alone in the other."""
    first = newest_server.run(sampled())
    kept, plain = (graphs.latent(newest_server, first, name) for name in ("save", "save_plain"))
    newest_server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")
    alone = {k: v for k, v in sampled().items() if k not in ("lora", "sample", "save")}
    assert torch.equal(plain, graphs.latent(newest_server, newest_server.run(alone), "save_plain"))
    assert torch.equal(kept, graphs.latent(newest_server, newest_server.run(sampled()), "save"))


def test_one_model_for_inversion_and_sampling(newest_server: ComfyServer) -> None:
    """The patched model inverts, and what it inverted is only good for it."""
    graph = graphs.base() | {"lora": lora(), "invert": graphs.inverter(model=["lora", 0])}
    graph |= {"sample": graphs.retracing_sampler(model=["lora", 0]), "save": graphs.save("sample")}
    graph |= {"save_source": graphs.save("encode")}
    result = newest_server.run(graph)
    back, source = (graphs.latent(newest_server, result, name) for name in ("save", "save_source"))
    assert float((back - source).square().mean()) < float(source.var())
    graph["null"] = graphs.node(
        "RetraceNullTextOptimizer", model=["pebble", 0], positive=["caption", 0], negative=["empty", 0],
        trajectory=["invert", 1], cfg=4.0, mode="pivotal", inner_steps=1, learning_rate=0.01, early_stop=0.0,
        parity=False, seed=0,
    )  # fmt: skip
    graph["sample"] = graphs.retracing_sampler(model=["pebble", 0], negative=["null", 0])
    graphs.fails(newest_server, graph, "RetraceNullTextOptimizer", "made with another model")


def test_several_pictures_and_saved_memory(newest_server: ComfyServer) -> None:
    graph = sampled(latent=["both", 0], save_memory="on", at_once=1)
    graph["other"] = graphs.node("RetracePebbleScene", index=4, objects=1, margin=0)
    graph["encode_other"] = graphs.node("VAEEncode", pixels=["other", 0], vae=["pebble", 2])
    graph["both"] = graphs.node("LatentBatch", samples1=["encode", 0], samples2=["encode_other", 0])
    result = newest_server.run(graph)
    assert "blocks were computed twice to save memory, as asked for" in result.text_of("lora")
    assert torch.isfinite(graphs.latent(newest_server, result, "save")).all()


def test_stopping_leaves_everything_as_it_was(server: ComfyServer) -> None:
    plain = {k: v for k, v in sampled().items() if k not in ("lora", "sample", "save")}
    before = graphs.latent(server, server.run(plain), "save_plain")

    def stop(seconds: float) -> None:
        if seconds > 2:
            server.request("POST", "/interrupt", b"{}", "application/json")

    long = {k: v for k, v in sampled(steps=10000, save_memory="on").items() if k not in ("plain", "save_plain")}
    with pytest.raises(ComfyError, match="interrupted at node lora"):
        server.run(long, on_wait=stop)
    for seed in (12, 5):  # the first empties the cache
        plain["plain"]["inputs"]["seed"] = seed
        after = server.run(plain)
    assert torch.equal(before, graphs.latent(server, after, "save_plain"))
    assert "fixed noise levels" in server.run(sampled(steps=1)).text_of("lora")


@pytest.mark.usefixtures("trained_pebble")
def test_it_learns_the_picture(newest_server: ComfyServer) -> None:
    """Half noised and sampled under its own caption, the scene comes back closer with the LoRA than without."""
    graph = sampled(rank=16, steps=30, learning_rate=2e-3, batch_size=4, at_once=4)
    for name in ("sample", "plain"):
        graph[name]["inputs"] |= {"denoise": 0.6, "cfg": 1.0, "steps": 10, "positive": ["caption", 0]}
    graph["save_source"] = graphs.save("encode")
    result = newest_server.run(graph)
    source = graphs.latent(newest_server, result, "save_source")
    errors = [
        float((graphs.latent(newest_server, result, name) - source).square().mean()) for name in ("save", "save_plain")
    ]
    assert errors[0] < 0.9 * errors[1]
    before, after = (float(part.split()[0]) for part in result.text_of("lora").split("levels: ")[1].split(", ")[:2])
    assert after < 0.95 * before


class TestRefusals:
    def test_time_ranges(self, server: ComfyServer) -> None:
        graph = sampled(positive=["range", 0])
        graph["range"] = graphs.node("ConditioningSetTimestepRange", conditioning=["caption", 0], start=0.2, end=1.0)
        graphs.fails(server, graph, NODE, "Identity LoRA: positive", "time range")

    def test_empty_latents(self, newest_server: ComfyServer) -> None:
        graph = sampled(latent=["nothing", 0])
        graph["nothing"] = graphs.node("EmptyLatentImage", width=128, height=128, batch_size=1)
        graphs.fails(newest_server, graph, NODE, "Identity LoRA: latent", "VAE Encode")

    def test_other_channels(self, newest_server: ComfyServer) -> None:
        graph = sampled(latent=["nothing", 0])
        graph["nothing"] = graphs.node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        graphs.fails(newest_server, graph, NODE, "Identity LoRA: latent", "16 channels")
