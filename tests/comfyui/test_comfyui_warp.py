"""Warp and Inpaint in the real ComfyUI, alone and before core's and our own ways to inpaint."""

from __future__ import annotations

import json
from typing import Any

import graphs
import numpy as np
import pytest
from PIL import Image

from retrace.models.pebble.scenes import Scene, sample_scene, scene_rng
from tools.comfyui.server import ComfyServer, RunResult

pytestmark = pytest.mark.usefixtures("pebble")

INDEX = 3
SHIFT = 24


def scene() -> Scene:
    return sample_scene(scene_rng("heldout", INDEX), 1)


def towards() -> tuple[int, int]:
    """A shift in whole pixels that keeps the object on the picture: towards the farther border."""
    return (SHIFT if scene().objects[0].x < 64 else -SHIFT), 0


def drag_points(*extra: list[list[float]]) -> str:
    thing, (dx, dy) = scene().objects[0], towards()
    handle = [thing.x / 128, thing.y / 128]
    return json.dumps([[handle, [handle[0] + dx / 128, handle[1] + dy / 128]], *extra])


def warped(**changes: Any) -> graphs.Graph:
    """A scene, a point on its object, and the picture with it moved; both pictures are saved."""
    inputs = {"points": ["points", 0], "mask": ["scene", 1], "mode": "rigid", "grow": 3, "border": 2, "feather": 0.0}
    inputs |= changes
    graph = {
        "scene": graphs.node("RetracePebbleScene", index=INDEX, objects=1, margin=4),
        "points": graphs.node("RetraceDragPoints", image=["scene", 0], points=drag_points()),
        "warp": graphs.node("RetraceWarpAndInpaint", **{k: v for k, v in inputs.items() if v is not None}),
        "mask": graphs.node("MaskToImage", mask=["warp", 1]),
        "moved": graphs.node("MaskToImage", mask=["warp", 2]),
        "object": graphs.node("MaskToImage", mask=["scene", 1]),
    }
    shown = {"source": ["scene", 0], "image": ["warp", 0], "hole": ["mask", 0], "place": ["moved", 0]}
    shown["area"] = ["object", 0]
    return graph | {name: graphs.node("PreviewImage", images=of) for name, of in shown.items()}


def picture(server: ComfyServer, result: RunResult, name: str) -> np.ndarray[Any, Any]:
    (entry,) = result.outputs[name]["images"]
    with Image.open(server.base / "temp" / entry["subfolder"] / entry["filename"]) as image:
        return np.asarray(image.convert("RGB"))


def test_the_object_moves_and_the_rest_stays(server: ComfyServer) -> None:
    result = server.run(warped())
    source, image, hole, place = (picture(server, result, name) for name in ("source", "image", "hole", "place"))
    dx, dy = towards()
    thing = scene().objects[0]
    x, y = int(thing.x), int(thing.y)
    before = source[y - 4 : y + 5, x - 4 : x + 5]
    after = image[y + dy - 4 : y + dy + 5, x + dx - 4 : x + dx + 5]
    assert (before == after).all()
    untouched = (hole == 0) & (place == 0)
    assert (image[untouched] == source[untouched]).all() and 0.5 < untouched.mean() < 0.99
    assert place[y + dy, x + dx].min() == 255
    assert (hole[(picture(server, result, "area") == 255) & (place == 0)] == 255).all()
    assert "to inpaint" in result.text_of("warp") and "point 1" in result.text_of("warp")


@pytest.mark.parametrize("changes", [{"mask": None}, {"mask": ["half", 0]}, {"mode": "scale"}, {"mode": "stretch"}])
def test_without_a_mask_with_a_half_one_and_in_every_mode(newest_server: ComfyServer, changes: dict[str, Any]) -> None:
    graph = warped(**changes) | {"half": graphs.solid_mask(0.5)}
    graph["points"]["inputs"]["points"] = drag_points([[0.05, 0.05], [0.05, 0.05]])
    result = newest_server.run(graph)
    text = result.text_of("warp")
    assert ("paint a mask" in text) == ("mask" in changes)


def test_into_cores_inpainting_and_into_blend_step(server: ComfyServer) -> None:
    graph = graphs.base(INDEX) | warped(feather=2.0)
    graph |= {
        "start": graphs.node(
            "VAEEncodeForInpaint", pixels=["warp", 0], vae=["pebble", 2], mask=["warp", 1], grow_mask_by=0
        ),
        "core": graphs.sampler(latent_image=["start", 0], positive=["caption", 0]),
        "conditions": graphs.node(
            "InpaintModelConditioning",
            positive=["caption", 0],
            negative=["empty", 0],
            vae=["pebble", 2],
            pixels=["warp", 0],
            mask=["warp", 1],
            noise_mask=True,
        ),
        "model": graphs.sampler(positive=["conditions", 0], negative=["conditions", 1], latent_image=["conditions", 2]),
        "kept": graphs.node("VAEEncode", pixels=["warp", 0], vae=["pebble", 2]),
        "blend": graphs.blend(mask=["warp", 1], source=["kept", 0], noise="fresh", cells="area"),
        "ours": graphs.sampler("blend", latent_image=["kept", 0], positive=["caption", 0]),
    }
    for name in ("core", "model", "ours"):
        graph |= {
            f"{name} decoded": graphs.node("VAEDecode", samples=[name, 0], vae=["pebble", 2]),
            f"{name} pasted": graphs.node(
                "RetracePasteBackground",
                edited=[f"{name} decoded", 0],
                source=["warp", 0],
                mask=["warp", 1],
                feather=0.0,
            ),
            name + " shown": graphs.node("PreviewImage", images=[f"{name} pasted", 0]),
        }
    result = server.run(graph)
    image, hole = picture(server, result, "image"), picture(server, result, "hole")
    for name in ("core", "model", "ours"):
        done = picture(server, result, f"{name} shown")
        assert (done[hole == 0] == image[hole == 0]).all(), name
        assert (done[hole > 0] != image[hole > 0]).any(), name


def test_requeued_it_gives_the_same(newest_server: ComfyServer) -> None:
    first, _, second = (newest_server.run(warped(grow=grow)) for grow in (4, 5, 4))
    assert (picture(newest_server, first, "image") == picture(newest_server, second, "image")).all()


def test_errors(server: ComfyServer) -> None:
    empty = warped(mask=["none", 0]) | {"none": graphs.solid_mask(0.0)}
    graphs.fails(server, empty, "RetraceWarpAndInpaint", "Warp and Inpaint: mask", "0 everywhere")
    small = warped(mask=["small", 0]) | {"small": graphs.solid_mask(1.0, 64, 96)}
    graphs.fails(server, small, "RetraceWarpAndInpaint", "128x128 is needed", "Resize")
    twice = warped()
    thing = scene().objects[0]
    twice["points"]["inputs"]["points"] = drag_points([[thing.x / 128, thing.y / 128], [0.9, 0.9]])
    graphs.fails(server, twice, "RetraceWarpAndInpaint", "1 and 2 have one handle", "two targets")
