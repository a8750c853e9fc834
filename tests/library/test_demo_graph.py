"""What the demo reads from the example graph and how it changes it; running it is tested with a real ComfyUI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrace.demo_graph import Graph, adapted, example, load_graph
from retrace.edit import EditSettings
from retrace.errors import InvalidFile


@pytest.fixture
def graph() -> Graph:
    return load_graph()


def links(graph: Graph) -> set[str]:
    """Ids of all nodes that another one takes something from."""
    return {v[0] for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)}


def only(graph: Graph, class_type: str) -> dict[str, Any]:
    (found,) = (node["inputs"] for node in graph.values() if node["class_type"] == class_type)
    return found


def test_the_defaults_of_an_edit_are_those_of_the_example_graph(graph: Graph) -> None:
    assert replace(example(graph).settings, seed=0) == EditSettings()


def test_settings_and_words_reach_every_node_that_has_them(graph: Graph) -> None:
    before = json.dumps(graph)
    settings = EditSettings(
        steps=7, guidance=3.0, method="fixed_point", seed=5, sampler="euler", background="fixed", cells="max", shrink=2
    )
    changed = adapted(graph, settings, "a green star")
    assert json.dumps(graph) == before, "the graph that was given was changed"
    inverter, sampler = only(changed, "RetraceDDIMInverter"), only(changed, "KSampler")
    assert (inverter["steps"], inverter["method"]) == (7, "fixed_point")
    assert (sampler["steps"], sampler["cfg"], sampler["seed"], sampler["sampler_name"]) == (7, 3.0, 5, "euler")
    blend = only(changed, "RetraceBlendStep")
    assert [blend[name] for name in ("noise", "cells", "shrink_stages", "seed")] == ["fixed", "max", 2, 5]
    assert "a green star" in json.dumps(changed)
    assert links(changed) <= set(changed)


def test_the_reconstruction_comes_back_without_guidance_or_new_noise(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=7), "x")
    back, inverter = changed["reconstruction latent"]["inputs"], only(changed, "RetraceDDIMInverter")
    assert (back["add_noise"], back["cfg"]) == (False, 1.0)
    assert back["positive"] == inverter["positive"]
    assert changed[back["sigmas"][0]]["inputs"] is inverter and back["sigmas"][1] == 2
    assert only(changed, "KSamplerSelect") == {"sampler_name": "euler"}


def test_the_sampler_that_paints_is_not_the_one_that_retraces(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=50, strength=0.7, sampler="euler_ancestral"), "x")
    customs = (n["inputs"] for n in changed.values() if n["class_type"] == "SamplerCustom")
    named = {n["add_noise"]: changed[n["sampler"][0]]["inputs"]["sampler_name"] for n in customs}
    assert named == {True: "euler_ancestral", False: "euler"}


def test_little_strength_walks_the_last_steps_of_the_same_grid(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=50, strength=0.7, seed=4), "x")
    assert not any(n["class_type"] == "KSampler" for n in changed.values())
    edit, back = sorted(
        (n["inputs"] for n in changed.values() if n["class_type"] == "SamplerCustom"), key=lambda n: -n["add_noise"]
    )
    assert (edit["add_noise"], edit["noise_seed"], edit["cfg"]) == (True, 4, 7.5)
    assert edit["sigmas"] == back["sigmas"]
    assert links(changed) <= set(changed)


def test_with_little_strength_the_inversion_goes_up_only_as_far(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=50, strength=0.7), "x")
    name, output = only(changed, "RetraceDDIMInverter")["sigmas"]
    assert output == 1 and changed[name]["class_type"] == "SplitSigmas"
    assert changed[name]["inputs"]["step"] == 15
    levels = only(changed, "BasicScheduler")
    assert (levels["steps"], levels["scheduler"], levels["denoise"]) == (50, "ddim_uniform", 1.0)
    assert "sigmas" not in only(adapted(graph, EditSettings(), "x"), "RetraceDDIMInverter")


def test_the_edit_is_shown_before_it_is_pasted(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(), "x")
    assert changed["unpasted"]["inputs"]["images"] == only(changed, "RetracePasteBackground")["edited"]


def test_an_own_picture_takes_the_place_of_the_scene(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(), "a cat", ("photo.png", "mask.png", "a dog"))
    assert not any(n["class_type"] == "RetracePebbleScene" for n in changed.values())
    assert only(changed, "LoadImage") == {"image": "photo.png"}
    assert only(changed, "RetraceMaskPrecisionBlur")["mask"] == ["own mask", 0]
    assert only(changed, "RetraceMaskPrecisionBlur")["level"] == 0
    texts = {n["inputs"]["text"] for n in changed.values() if n["class_type"] == "CLIPTextEncode"}
    assert texts == {"a dog", "a cat", ""}
    assert links(changed) <= set(changed)


def test_a_damaged_graph_is_named(tmp_path: Path, graph: Graph) -> None:
    (tmp_path / "graph.json").write_text("{")
    with pytest.raises(InvalidFile, match=r"graph\.json cannot be read"):
        load_graph(tmp_path / "graph.json")
    with pytest.raises(InvalidFile, match="0 nodes KSampler"):
        example({k: v for k, v in graph.items() if v["class_type"] != "KSampler"})
