"""Background Reconstruction in the real ComfyUI."""

from __future__ import annotations

import re
from typing import Any

import graphs
import pytest
from PIL import Image

from tools.comfyui.server import ComfyError, ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def _graph(**changes: Any) -> graphs.Graph:
    """A white square pasted on a scene, through the VAE: the background is what the VAE makes of it."""
    inputs: dict[str, object] = {"edited": ["decode", 0], "source": ["scene", 0], "mask": ["scene", 1]}
    inputs |= {"vae": ["pebble", 2]}
    inputs |= {"method": "decoder", "steps": 3, "learning_rate": 1e-4, "weight": 100.0, "stop": 0.0, **changes}
    return {
        "scene": graphs.node("RetracePebbleScene", index=3, objects=1, margin=2),
        "pebble": graphs.node("RetraceLoadPebble"),
        "white": graphs.node("EmptyImage", width=128, height=128, batch_size=1, color=0xFFFFFF),
        "paste": graphs.node(
            "RetracePasteBackground", edited=["white", 0], source=["scene", 0], mask=["scene", 1], feather=0.0
        ),
        "encode": graphs.node("VAEEncode", pixels=["paste", 0], vae=["pebble", 2]),
        "decode": graphs.node("VAEDecode", samples=["encode", 0], vae=["pebble", 2]),
        "back": graphs.node("RetraceBackgroundReconstruction", **{k: v for k, v in inputs.items() if v is not None}),
        "show": graphs.node("PreviewImage", images=["back", 0]),
        "report": graphs.node(
            "RetraceEditReport", edited=["back", 0], source=["scene", 0], mask=["scene", 1], lpips=False
        ),
    }


def test_the_decoder_learns_the_background_and_the_vae_stays(server: ComfyServer) -> None:
    graph = _graph() | {"save": graphs.node("SaveImage", images=["decode", 0], filename_prefix="before")}
    first = server.run(graph)
    found = re.fullmatch(
        r"background of number 0: ([\d.]+) dB as decoded, ([\d.]+) dB after 3 steps", first.text_of("back")
    )
    assert found is not None, first.text_of("back")
    assert float(found[2]) > float(found[1]) + 1
    # The same VAE, decoding another latent and coming back, makes the same picture of the first one.
    graph["encode"]["inputs"]["pixels"] = ["scene", 0]
    server.run(graph)
    graph["encode"]["inputs"]["pixels"] = ["paste", 0]
    graph["back"]["inputs"]["steps"] = 2
    pictures = [
        Image.open(server.base / "output" / entry["filename"]).tobytes()
        for entry in (first.outputs["save"]["images"] + server.run(graph).outputs["save"]["images"])
    ]
    assert len(pictures) == 2 and pictures[0] == pictures[1]


def test_stop_ends_early_and_poisson_needs_no_vae(newest_server: ComfyServer) -> None:
    assert "after 0 steps" in newest_server.run(_graph(stop=10.0)).text_of("back")
    result = newest_server.run(_graph(method="poisson", vae=None))
    assert "now exact" in result.text_of("back") and "identical" in result.text_of("report")


def test_errors_name_the_node(server: ComfyServer) -> None:
    name = "RetraceBackgroundReconstruction"
    graphs.fails(server, _graph(vae=None), name, "Background Reconstruction:", "no VAE is connected")
    full = _graph(mask=["all", 0]) | {"all": graphs.solid_mask(1.0)}
    for method in ("decoder", "poisson"):
        full["back"]["inputs"]["method"] = method
        graphs.fails(server, full, name, "Background Reconstruction: mask", "above 0 everywhere")


def test_stopping_leaves_the_server_well(server: ComfyServer) -> None:
    def stop(seconds: float) -> None:
        if seconds > 1:
            server.request("POST", "/interrupt", b"{}", "application/json")

    with pytest.raises(ComfyError, match="interrupted at node back"):
        server.run(_graph(steps=10000), on_wait=stop)
    assert "after 1 steps" in server.run(_graph(steps=1)).text_of("back")
