"""Drag Points in the real ComfyUI, with its points as JSON, as programs use it."""

from __future__ import annotations

import json
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from PIL import Image

from retrace.drag.area import movable_area
from retrace.drag.points import parse_points
from tools.comfyui.server import ComfyServer, RunResult

SIZE = (48, 80)  # height, width
PAIR = {"handle": [0.25, 0.5], "target": [0.75, 0.5]}
DAB = {"points": [[0.5, 0.5]], "radius": 0.1}


def _graph(points: Any = (PAIR,), masked: bool = False, **more: dict[str, Any]) -> graphs.Graph:
    """An empty picture with these points; ``masked`` connects a node called mask. ``more`` nodes replace or add."""
    inputs: dict[str, Any] = {
        "image": ["picture", 0],
        "points": points if isinstance(points, str) else json.dumps(points),
    }
    if masked:
        inputs["mask"] = ["mask", 0]
    return {
        "picture": graphs.node("EmptyImage", width=SIZE[1], height=SIZE[0], batch_size=1, color=0x336699),
        "drag": graphs.node("RetraceDragPoints", **inputs),
        "area": graphs.node("MaskToImage", mask=["drag", 1]),
        "show_area": graphs.node("PreviewImage", images=["area", 0]),
        "show": graphs.node("PreviewImage", images=["drag", 2]),
        **more,
    }


def _picture(server: ComfyServer, result: RunResult, node: str, key: str = "images") -> Image.Image:
    (entry,) = result.outputs[node][key]
    return Image.open(server.base / entry["type"] / entry["subfolder"] / entry["filename"]).convert("RGB")


def _area(server: ComfyServer, result: RunResult) -> torch.Tensor:
    return torch.from_numpy(np.asarray(_picture(server, result, "show_area"), np.float32)[None, :, :, 0] / 255)


def test_the_picture_passes_through_and_goes_to_the_widget(server: ComfyServer) -> None:
    result = server.run(_graph())
    passed, shown = _picture(server, result, "show"), _picture(server, result, "drag", "retrace_picture")
    assert passed.size == shown.size == (SIZE[1], SIZE[0])
    assert passed.getpixel((3, 3)) == shown.getpixel((3, 3)) == (0x33, 0x66, 0x99)
    assert "images" not in result.outputs["drag"], "core would draw the picture a second time"
    assert torch.equal(_area(server, result), torch.ones(1, *SIZE))


def test_the_mask_and_the_strokes_make_the_area(server: ComfyServer) -> None:
    solid = graphs.solid_mask(0.0, SIZE[1], SIZE[0])
    bar = graphs.node("SolidMask", value=1.0, width=20, height=SIZE[0])
    mask = graphs.node("MaskComposite", destination=["solid", 0], source=["bar", 0], x=0, y=0, operation="add")
    value = {"points": [PAIR], "strokes": [DAB, {"points": [[0.0, 0.0], [0.0, 1.0]], "radius": 0.1, "erase": True}]}
    result = server.run(_graph(value, masked=True, solid=solid, bar=bar, mask=mask))
    below = torch.zeros(1, *SIZE)
    below[:, :, :20] = 1
    expected = movable_area(parse_points(json.dumps(value))[1], *SIZE, below)
    torch.testing.assert_close(_area(server, result), expected, rtol=0, atol=1.01 / 255)


def test_an_empty_mask_of_any_size_is_none(server: ComfyServer) -> None:
    result = server.run(_graph(masked=True, mask=graphs.solid_mask(0.0, 64, 64)))
    assert torch.equal(_area(server, result), torch.ones(1, *SIZE))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ("", ["there are no points", "press on what should move"]),
        ({"points": [], "strokes": [DAB]}, ["there are no points"]),
        ("{oops", ["not valid JSON", "should look like"]),
        ([[100, 20, 200, 20]], ["pair 1, handle", "divide pixels"]),
        ({"points": [PAIR], "strokes": [{**DAB, "radius": 1, "erase": True}]}, ["all of it was erased"]),
    ],
)
def test_wrong_points_are_an_error_that_says_what_to_do(server: ComfyServer, points: Any, words: list[str]) -> None:
    graphs.fails(server, _graph(points), "RetraceDragPoints", "Drag Points: ", *words)


def test_a_batch_and_a_mask_of_another_size_are_refused(server: ComfyServer) -> None:
    batch = graphs.node("EmptyImage", width=SIZE[1], height=SIZE[0], batch_size=3, color=0)
    graphs.fails(server, _graph(picture=batch), "RetraceDragPoints", "3 images", "one is needed")
    other = _graph(masked=True, mask=graphs.solid_mask(1.0, 64, 64))
    graphs.fails(server, other, "RetraceDragPoints", "64x64", f"{SIZE[1]}x{SIZE[0]} is needed")


def test_points_that_another_node_makes_arrive(server: ComfyServer) -> None:
    graph = _graph(text=graphs.node("PrimitiveStringMultiline", value="[[0, 0, 1, 1]]"))
    graph["drag"]["inputs"]["points"] = ["text", 0]
    assert torch.equal(_area(server, server.run(graph)), torch.ones(1, *SIZE))
    graph["text"]["inputs"]["value"] = ""
    graphs.fails(server, graph, "RetraceDragPoints", "there are no points")
