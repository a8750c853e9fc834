"""Reference KV Control in the real ComfyUI: batches of a reference and its edits under KSampler."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def control(**changes: Any) -> dict[str, Any]:
    inputs = {"model": ["pebble", 0], "first_layer": -1, "start_percent": 0.0, "end_percent": 1.0}
    return graphs.node("RetraceReferenceKVControl", **{**inputs, **changes})


def controlled(**changes: Any) -> graphs.Graph:
    """Two scenes in one batch, sampled with and without control, in full and the edit alone."""
    graph = graphs.base() | {"control": control(**changes)}
    graph["other"] = graphs.node("RetracePebbleScene", index=4, objects=1, margin=0)
    graph["other_latent"] = graphs.node("VAEEncode", pixels=["other", 0], vae=["pebble", 2])
    graph["batch"] = graphs.node("LatentBatch", samples1=["encode", 0], samples2=["other_latent", 0])
    shared: dict[str, Any] = {"latent_image": ["batch", 0], "denoise": 0.7}
    graph |= {"plain": graphs.sampler(**shared), "sample": graphs.sampler("control", **shared)}
    graph["edit"] = graphs.node("LatentFromBatch", samples=["sample", 0], batch_index=1, length=1)
    return graph | {"save_plain": graphs.save("plain"), "save": graphs.save("sample"), "save_edit": graphs.save("edit")}


def run(server: ComfyServer, graph: graphs.Graph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch without and with control, and the edit that core takes out of it."""
    result = server.run(graph)
    plain, batch, edit = (graphs.latent(server, result, name) for name in ("save_plain", "save", "save_edit"))
    return plain, batch, edit


def free(server: ComfyServer) -> None:
    server.request("POST", "/free", b'{"unload_models": true, "free_memory": true}', "application/json")


def test_the_edit_changes_and_the_reference_does_not(server: ComfyServer) -> None:
    plain, batch, edit = run(server, controlled())
    torch.testing.assert_close(batch[0], plain[0], rtol=1e-5, atol=1e-4)
    assert float((batch[1] - plain[1]).abs().mean()) > 0.01
    assert torch.equal(edit[0], batch[1])
    free(server)
    again = run(server, controlled())
    assert all(torch.equal(a, b) for a, b in zip(again, (plain, batch, edit), strict=True)), "re-queued: the same bits"


def test_a_graph_without_the_node_is_untouched(server: ComfyServer) -> None:
    bare = controlled()
    for name in ("control", "sample", "edit", "save", "save_edit"):
        del bare[name]
    before = graphs.latent(server, server.run(bare), "save_plain")
    plain, _, _ = run(server, controlled())
    free(server)
    after = graphs.latent(server, server.run(bare), "save_plain")
    assert torch.equal(before, plain) and torch.equal(before, after)


def test_it_is_the_hook_of_the_library(newest_server: ComfyServer) -> None:
    """Core's Euler with the patch, against the same steps on the diffusers host."""
    from retrace.attention.reference_kv import ReferenceKV, default_first_layer
    from retrace.core.sampling import sample_ddim
    from retrace.hosts.diffusers import DiffusersHost
    from retrace.hosts.diffusers.attention import attention_blocks
    from retrace.inversion.invert import invert

    graph = controlled()
    graph["invert"] = graphs.inverter(latent=["encode", 0])
    graph["second"] = graphs.inverter(latent=["other_latent", 0])
    graph["batch"] = graphs.node("LatentBatch", samples1=["invert", 0], samples2=["second", 0])
    for name, model in (("plain", "pebble"), ("sample", "control")):
        graph[name] = graphs.retracing_sampler(model=[model, 0], latent_image=["batch", 0], cfg=3.0)
    graph |= {"save_source": graphs.save("encode"), "save_other": graphs.save("other_latent")}
    graph["caption"]["inputs"]["text"] = "a red circle on sand"
    result = newest_server.run(graph)
    batch, *sources = (graphs.latent(newest_server, result, n) for n in ("save", "save_source", "save_other"))

    host = DiffusersHost.load(None, device="cpu")
    sigmas, scale = host.sigmas("normal", graphs.STEPS), float(host.vae.config.scaling_factor)
    conds = {"text": host.encode_text("a red circle on sand"), "empty": host.encode_text("")}

    def method(model: Any, x: Any, c: Any) -> Any:
        noise = torch.cat([invert(model, one, sigmas, c["text"]).noise for one in x.split(1)])
        with model.attention(ReferenceKV(default_first_layer(attention_blocks(host.unet)))):
            return sample_ddim(model, noise.to(x), sigmas, c["text"], c["empty"], 3.0)

    expected = host.run(torch.cat(sources) * scale, conds, method) / scale
    torch.testing.assert_close(batch, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "uni_pc"])
def test_under_other_samplers(newest_server: ComfyServer, name: str) -> None:
    graph = controlled()
    graph["sample"]["inputs"]["sampler_name"] = graph["plain"]["inputs"]["sampler_name"] = name
    plain, batch, _ = run(newest_server, graph)
    torch.testing.assert_close(batch[0], plain[0], rtol=1e-5, atol=1e-3)
    assert float((batch[1] - plain[1]).abs().mean()) > 0.01


def test_a_window_that_no_step_is_in_changes_nothing(newest_server: ComfyServer) -> None:
    plain, batch, _ = run(newest_server, controlled(end_percent=0.05))  # the first step has 30 % behind it
    torch.testing.assert_close(batch, plain, rtol=1e-5, atol=1e-4)


def test_a_single_picture_is_an_error(server: ComfyServer) -> None:
    graph = controlled()
    graph["sample"]["inputs"]["latent_image"] = ["encode", 0]
    graphs.fails(server, graph, "KSampler", "batch of 1", "[reference, edit", "Latent Batch")


def test_what_cannot_be_is_said(newest_server: ComfyServer) -> None:
    node = "RetraceReferenceKVControl"
    graphs.fails(newest_server, controlled(first_layer=9), node, "Reference KV Control", "9", "7 self-attention layers")
    graphs.fails(newest_server, controlled(start_percent=0.6, end_percent=0.3), node, "starts at 0.6")
