"""Rank by CLIP in the real ComfyUI, on scenes whose order Pebble's CLIP is sure of."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
from PIL import Image

from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def _ranked(**changes: Any) -> graphs.Graph:
    """Three scenes in one batch, ranked for the words of the second."""
    scenes = {f"scene{i}": graphs.node("RetracePebbleScene", index=i, objects=1, margin=0) for i in (3, 5, 7)}
    inputs: dict[str, object] = {
        "images": ["batch", 0],
        "clip": ["clip", 0],
        "prompt": ["scene5", 2],
        "mask": ["scene5", 1],
    }
    inputs |= {"region": "whole", "keep": 0, "parity": False, **changes}
    return {
        **scenes,
        "two": graphs.node("ImageBatch", image1=["scene3", 0], image2=["scene5", 0]),
        "batch": graphs.node("ImageBatch", image1=["two", 0], image2=["scene7", 0]),
        "clip": graphs.node("RetraceLoadCLIP", model="Pebble's CLIP", architecture="ViT-B-32-quickgelu"),
        "rank": graphs.node("RetraceRankByCLIP", **{k: v for k, v in inputs.items() if v is not None}),
        "show": graphs.node("PreviewImage", images=["rank", 0]),
        "index": graphs.node("PreviewAny", source=["rank", 1]),
    }


@pytest.mark.usefixtures("trained_pebble")
def test_the_best_comes_first_with_its_score_on_it(server: ComfyServer) -> None:
    result = server.run(_ranked())
    rows = [row.split() for row in result.text_of("rank").splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3"] and rows[0][1] == "1"
    assert float(rows[0][2]) > float(rows[1][2]) >= float(rows[2][2])
    assert result.outputs["index"]["text"][0] == "1"
    pictures = {name: _pictures(server, result.outputs[name]["images"]) for name in ("rank", "show")}
    assert len(pictures["rank"]) == len(pictures["show"]) == 3
    labelled, plain = pictures["rank"][0], pictures["show"][0]
    assert plain.size == (128, 128) and labelled.size == (128, 144)
    assert labelled.crop((0, 0, 128, 128)).tobytes() == plain.tobytes()


def _pictures(server: ComfyServer, entries: list[dict[str, str]]) -> list[Image.Image]:
    folder = server.base / "temp"
    return [Image.open(folder / entry["subfolder"] / entry["filename"]).convert("RGB") for entry in entries]


@pytest.mark.parametrize("region", ["masked", "box", "whole"])
def test_keep_and_parity_in_every_region(newest_server: ComfyServer, region: str) -> None:
    result = newest_server.run(_ranked(keep=2, region=region, parity=True))
    assert "lower is better" in result.text_of("rank") and len(result.text_of("rank").splitlines()) == 4
    assert len(result.outputs["show"]["images"]) == len(result.outputs["rank"]["images"]) == 2


def test_one_picture_without_a_mask_and_errors(server: ComfyServer) -> None:
    alone = _ranked(images=["scene5", 0], mask=None, keep=8, region="masked")
    assert len(server.run(alone).outputs["show"]["images"]) == 1
    empty = _ranked(mask=["none", 0], region="box") | {"none": graphs.solid_mask(0.0)}
    graphs.fails(server, empty, "RetraceRankByCLIP", "Rank by CLIP: mask", "0 everywhere")
    graphs.fails(server, _ranked(prompt=""), "RetraceRankByCLIP", "Rank by CLIP: prompt", "empty")
