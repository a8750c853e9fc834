"""`run.py demo` is what the shipped graph "Invert and blend" does."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installs import ROOT
from PIL import Image
from torch import Tensor

from retrace.cli.edit import EditSettings
from retrace.cli.main import example_job, perform
from retrace.pictures.convert import to_picture
from tools.comfyui.server import ComfyServer, RunResult

STEPS = 4


def _graph() -> dict[str, dict[str, Any]]:
    path = ROOT / "workflows" / "api" / "invert_and_blend.json"
    graph: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return graph


def _inputs(graph: dict[str, dict[str, Any]], class_type: str) -> dict[str, Any]:
    """Those of the only node of its class."""
    (inputs,) = (node["inputs"] for node in graph.values() if node["class_type"] == class_type)
    return dict(inputs)


def _levels(image: Tensor) -> np.ndarray:
    return np.array(to_picture(image).convert("RGB")).astype(int)


def _saved(result: RunResult) -> np.ndarray:
    (image,) = (image for image in result.images if image.type == "output")
    return np.array(Image.open(io.BytesIO(image.read())).convert("RGB")).astype(int)


def test_the_demo_has_the_settings_of_the_graph() -> None:
    graph, job = _graph(), example_job(Path("unused"))
    sampler, inverter = _inputs(graph, "KSampler"), _inputs(graph, "RetraceDDIMInverter")
    blend, paste = _inputs(graph, "RetraceBlendStep"), _inputs(graph, "RetracePasteBackground")
    assert job.settings == EditSettings(
        steps=sampler["steps"],
        guidance=sampler["cfg"],
        strength=sampler["denoise"],
        scheduler=sampler["scheduler"],
        method=inverter["method"],
        sampler=sampler["sampler_name"],
        background=blend["noise"],
        cells=blend["cells"],
        shrink=blend["shrink_stages"],
        feather=paste["feather"],
        seed=sampler["seed"],
    )
    assert (inverter["steps"], inverter["scheduler"]) == (sampler["steps"], sampler["scheduler"])
    assert job.prompts.target == graph[sampler["positive"][0]]["inputs"]["text"]
    assert job.prompts.negative == graph[sampler["negative"][0]]["inputs"]["text"]


@pytest.mark.usefixtures("pebble")
def test_the_demo_is_the_same_edit_in_both_hosts(newest_server: ComfyServer, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    job = example_job(tmp_path)
    job = replace(job, settings=replace(job.settings, steps=STEPS))
    graph = _graph()
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = STEPS
        if node["class_type"] == "RetraceBlendStep":  # the demo has one seed for both
            node["inputs"]["seed"] = job.settings.seed
    through_comfyui = _saved(newest_server.run(graph))
    outcome = perform(argparse.Namespace(model=None, device="cpu", size=None), job)
    # One level apart because ComfyUI cuts off what the other rounds when it goes to 8 bits.
    assert abs(_levels(outcome.edited[0]) - through_comfyui).max() <= 2
    assert abs(_levels(outcome.source[0]) - through_comfyui).max() > 40, "nothing was edited"
