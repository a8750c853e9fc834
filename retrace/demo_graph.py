"""The shipped example graph "Invert and blend", for the demo: what it edits, and the same edit run by a ComfyUI."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .edit import EditSettings
from .errors import InvalidFile
from .hosts.comfyui_install import ComfyError, ComfyInstall
from .hosts.comfyui_server import ComfyServer, NodeProgress, RunResult
from .picture_files import to_picture

GRAPH = Path(__file__).resolve().parents[1] / "workflows" / "api" / "invert_and_blend.json"

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """What the graph edits as it ships: Pebble scene ``index``, its mask at a precision ``level`` of ``levels``."""

    index: int
    objects: int
    margin: int
    level: int
    levels: int
    prompt: str
    settings: EditSettings


@dataclass(frozen=True)
class ComfyResult:
    """Pictures ``[1, H, W, 3]`` that a ComfyUI made, 8-bit values in 0..1, and the reports of its nodes.

    ``edited`` comes out of Paste Background, ``unpasted`` goes into it.
    """

    source: Tensor
    reconstruction: Tensor
    edited: Tensor
    unpasted: Tensor
    reports: dict[str, str]
    seconds: float


def load_graph(path: Path = GRAPH) -> Graph:
    """The graph in API form; raises :class:`InvalidFile` when it is missing or damaged."""
    try:
        return cast(Graph, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidFile(f"The example graph {path} cannot be read ({error}). Restore the file.") from error


def _node(graph: Graph, class_type: str) -> tuple[str, dict[str, Any]]:
    """Id and inputs of the only node of its class."""
    found = [(name, node["inputs"]) for name, node in graph.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise InvalidFile(
            f"The example graph has {len(found)} nodes {class_type}, but one is needed. Restore the file."
        )
    return found[0]


def example(graph: Graph) -> Example:
    """What ``graph`` edits, and how."""
    _, scene = _node(graph, "RetracePebbleScene")
    _, mask = _node(graph, "RetraceMaskPrecisionBlur")
    _, sampler = _node(graph, "KSampler")
    _, inverter = _node(graph, "RetraceDDIMInverter")
    _, blend = _node(graph, "RetraceBlendStep")
    _, paste = _node(graph, "RetracePasteBackground")
    settings = EditSettings(
        steps=sampler["steps"],
        guidance=float(sampler["cfg"]),
        strength=float(sampler["denoise"]),
        scheduler=sampler["scheduler"],
        method=inverter["method"],
        sampler=sampler["sampler_name"],
        background=blend["noise"],
        cells=blend["cells"],
        shrink=blend["shrink_stages"],
        feather=float(paste["feather"]),
        seed=sampler["seed"],
    )
    prompt = graph[sampler["positive"][0]]["inputs"]["text"]
    return Example(
        scene["index"], scene["objects"], scene.get("margin", 0), mask["level"], mask["levels"], prompt, settings
    )


def adapted(graph: Graph, settings: EditSettings, prompt: str, own: tuple[str, str, str] | None = None) -> Graph:
    """``graph`` with these settings and words, and with the reconstruction as one more picture.

    ``own`` puts a picture, its mask (both names in ComfyUI's input folder) and its words in the place of the scene.
    """
    graph = copy.deepcopy(graph)
    scene, _ = _node(graph, "RetracePebbleScene")
    inverter, inversion = _node(graph, "RetraceDDIMInverter")
    sampler, sampling = _node(graph, "KSampler")
    inversion |= {"steps": settings.steps, "scheduler": settings.scheduler, "method": settings.method}
    sampling |= {
        "steps": settings.steps,
        "scheduler": settings.scheduler,
        "sampler_name": settings.sampler,
        "cfg": settings.guidance,
        "seed": settings.seed,
    }
    _node(graph, "RetraceBlendStep")[1].update(
        noise=settings.background, cells=settings.cells, shrink_stages=settings.shrink, seed=settings.seed
    )
    _, pasted = _node(graph, "RetracePasteBackground")
    pasted["feather"] = settings.feather
    graph["unpasted"] = {"class_type": "PreviewImage", "inputs": {"images": pasted["edited"]}}
    graph[sampling["positive"][0]]["inputs"]["text"] = prompt
    graph["retracing sampler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    walked = {"sampler": ["retracing sampler", 0], "sigmas": [inverter, 2]}
    if settings.strength < 1:
        # KSampler's denoise would spread the steps over the lower levels; here both walk the last steps of one grid.
        skipped = settings.steps - settings.walked_steps
        levels = {"model": inversion["model"], "scheduler": settings.scheduler, "steps": settings.steps, "denoise": 1.0}
        graph["all levels"] = {"class_type": "BasicScheduler", "inputs": levels}
        graph["levels"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["all levels", 0], "step": skipped}}
        inversion["sigmas"] = ["levels", 1]
        kept = {name: sampling[name] for name in ("model", "positive", "negative", "latent_image", "cfg")}
        start = {"add_noise": True, "noise_seed": settings.seed}
        graph["sampler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": settings.sampler}}
        painting = walked | {"sampler": ["sampler", 0]}
        graph[sampler] |= {"class_type": "SamplerCustom", "inputs": kept | start | painting}
    back = {
        "model": inversion["model"],
        "positive": inversion["positive"],
        "negative": inversion["positive"],  # at cfg 1 nobody asks for it
        "latent_image": [inverter, 0],
        "cfg": 1.0,
        "add_noise": False,
        "noise_seed": 0,
    }
    graph["reconstruction latent"] = {"class_type": "SamplerCustom", "inputs": back | walked}
    graph["reconstruction picture"] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": ["reconstruction latent", 0], "vae": inversion["vae"]},
    }
    graph["reconstruction"] = {"class_type": "PreviewImage", "inputs": {"images": ["reconstruction picture", 0]}}
    if own is not None:
        image, mask, words = own
        graph["own picture"] = {"class_type": "LoadImage", "inputs": {"image": image}}
        graph["own mask"] = {"class_type": "LoadImageMask", "inputs": {"image": mask, "channel": "red"}}
        _node(graph, "RetraceMaskPrecisionBlur")[1].update(level=0, edges="soft")  # the mask as it was drawn
        links: list[Any] = [["own picture", 0], ["own mask", 0], words]
        for node in graph.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == scene:
                    node["inputs"][name] = links[value[1]]
        del graph[scene]
    return graph


def run_in_comfyui(
    install: ComfyInstall,
    settings: EditSettings,
    prompt: str,
    own: tuple[Tensor, Tensor, str] | None = None,
    on_wait: Callable[[float], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    device: str = "cpu",
) -> ComfyResult:
    """Run the example graph in ``install``, on its own scene or on a picture ``[H, W, 3]``, mask ``[H, W]`` and words.

    ``on_progress`` is called with the title of the node that works, its step and its number of steps (0 of 0 as it
    begins). ``device`` is ``cpu``, or a graphics card: ``cuda``, ``cuda:1``, ``mps``; which ComfyUI then finds itself.

    Raises:
        ComfyError: that ComfyUI does not start, refuses the graph, or a node fails.
        InvalidFile: the graph is damaged.
    """
    graph = load_graph()
    kind, _, number = device.partition(":")
    card = ["--cuda-device", number] if kind == "cuda" and number else []
    with ComfyServer(install, gpu=kind != "cpu", arguments=card) as server:
        names = None
        if own is not None:
            with tempfile.TemporaryDirectory() as folder:
                uploaded = []
                for name, tensor in (("retrace_picture.png", own[0]), ("retrace_mask.png", own[1])):
                    to_picture(tensor).convert("RGB").save(Path(folder) / name)
                    uploaded.append(server.upload_image(Path(folder) / name))
            names = (uploaded[0], uploaded[1], own[2])
        graph = adapted(graph, settings, prompt, names)

        def progress(news: NodeProgress) -> None:
            if on_progress is not None and news.node_id in graph:
                on_progress(_title(graph[news.node_id]), news.value, news.maximum)

        result = server.run(graph, on_wait=on_wait, on_progress=progress, timeout=3600)
        shown = {graph[name]["inputs"]["images"][0]: name for name, node in graph.items() if _shows_images(node)}
        paste, pasted = _node(graph, "RetracePasteBackground")
        reports = {node["class_type"]: result.text_of(name) for name, node in graph.items() if result.text_of(name)}
        return ComfyResult(
            source=_picture(result, shown.get(pasted["source"][0])),
            reconstruction=_picture(result, "reconstruction"),
            edited=_picture(result, shown.get(paste)),
            unpasted=_picture(result, "unpasted"),
            reports=reports,
            seconds=result.seconds,
        )


def _title(node: dict[str, Any]) -> str:
    return str(node.get("_meta", {}).get("title") or node["class_type"])


def _shows_images(node: dict[str, Any]) -> bool:
    return node["class_type"] in ("PreviewImage", "SaveImage") and isinstance(node["inputs"].get("images"), list)


def _picture(result: RunResult, node: str | None) -> Tensor:
    images = result.images_of(node) if node is not None else []
    if not images:
        raise ComfyError(f"the example graph gave no picture at node {node}")
    pixels = np.array(Image.open(io.BytesIO(images[0].read())).convert("RGB"))
    return torch.from_numpy(pixels).float()[None] / 255
