"""Load CLIP and the CLIP figures of Edit Report in the real ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")
PEBBLE = {"model": "Pebble's CLIP", "architecture": "ViT-B-32-quickgelu"}


def report(prompt: str = "", load: dict[str, Any] = PEBBLE, **changes: Any) -> graphs.Graph:
    """A scene against another one, scored for the words of the other one."""
    inputs = {"edited": ["other", 0], "source": ["scene", 0], "mask": ["scene", 1], "lpips": False, "clip": ["clip", 0]}
    return {
        "scene": graphs.node("RetracePebbleScene", index=3, objects=1, margin=0),
        "other": graphs.node("RetracePebbleScene", index=5, objects=1, margin=0),
        "clip": graphs.node("RetraceLoadCLIP", **load),
        "report": graphs.node("RetraceEditReport", **{**inputs, "prompt": prompt, **changes}),
        "json": graphs.node("PreviewAny", source=["report", 1]),
    }


def _content(server: ComfyServer, graph: graphs.Graph) -> dict[str, Any]:
    return json.loads(server.run(graph).outputs["json"]["text"][0])  # type: ignore[no-any-return]


def test_the_report_scores_words_and_layout(server: ComfyServer) -> None:
    graph = report(prompt=["other", 2])  # type: ignore[arg-type]
    content = _content(server, graph)
    assert content["overall"]["clip"] > 0.3 and content["structure_distance"] > 0
    assert None not in (content["inside"]["clip"], content["outside"]["clip"], content["clip_box"])
    graph["report"]["inputs"]["edited"] = ["scene", 0]
    unchanged = _content(server, graph)
    assert unchanged["structure_distance"] == 0
    assert unchanged["overall"]["clip"] < content["overall"]["clip"]


def test_reports_of_saved_graphs_are_as_before(server: ComfyServer) -> None:
    graph = report()
    for name in ("clip", "prompt"):
        del graph["report"]["inputs"][name]
    content = _content(server, graph)
    assert content["overall"]["clip"] is None and content["structure_distance"] is None
    graph["report"]["inputs"]["prompt"] = "a red circle"
    graphs.fails(server, graph, "RetraceEditReport", "Edit Report: prompt", "Load CLIP (Retrace)")


def test_missing_and_wrong_files_are_named(server: ComfyServer) -> None:
    known = report(load={**PEBBLE, "model": "ViT-L-14/openai"})
    folder = server.base / "models" / "open_clip"
    graphs.fails(
        server, known, "RetraceLoadCLIP", "Load CLIP (Retrace)", "'ViT-L-14-openai.safetensors'", str(folder), "https"
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"text_model.a": torch.zeros(1)}, folder / "words.pt")
    choices = json.dumps(server.object_info()["RetraceLoadCLIP"]["input"]["required"]["model"])
    assert "open_clip/words.pt" in choices
    own = report(load={**PEBBLE, "model": "open_clip/words.pt"})
    graphs.fails(server, own, "RetraceLoadCLIP", "'words.pt'", "only the text side")
