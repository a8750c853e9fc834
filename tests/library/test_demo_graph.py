"""What the demo reads from the example graph and how it changes it; running it is tested with a real ComfyUI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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


def only(graph: Graph, class_type: str) -> dict[str, object]:
    (found,) = (node["inputs"] for node in graph.values() if node["class_type"] == class_type)
    return found


def test_the_defaults_of_an_edit_are_those_of_the_example_graph(graph: Graph) -> None:
    assert replace(example(graph).settings, seed=0) == EditSettings()


def test_settings_and_words_reach_every_node_that_has_them(graph: Graph) -> None:
    before = json.dumps(graph)
    settings = EditSettings(steps=7, guidance=3.0, method="fixed_point", seed=5, background="fixed", shrink=2)
    changed = adapted(graph, settings, "a green star")
    assert json.dumps(graph) == before, "the graph that was given was changed"
    inverter, sampler = only(changed, "RetraceDDIMInverter"), only(changed, "KSampler")
    assert (inverter["steps"], inverter["method"]) == (7, "fixed_point")
    assert (sampler["steps"], sampler["cfg"], sampler["seed"]) == (7, 3.0, 5)
    assert only(changed, "RetraceBlendStep")["noise"] == "fixed"
    assert "a green star" in json.dumps(changed)
    assert links(changed) <= set(changed)


def test_the_reconstruction_comes_back_without_guidance_or_new_noise(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=7), "x")
    back = changed["reconstruction latent"]["inputs"]
    assert (back["add_noise"], back["cfg"], back["steps"], back["start_at_step"]) == ("disable", 1.0, 7, 0)
    assert back["positive"] == only(changed, "RetraceDDIMInverter")["positive"]


def test_strength_skips_steps_of_the_same_grid(graph: Graph) -> None:
    changed = adapted(graph, EditSettings(steps=50, strength=0.7), "x")
    starts = {
        n["inputs"]["start_at_step"]: n["inputs"] for n in changed.values() if n["class_type"] == "KSamplerAdvanced"
    }
    assert set(starts) == {0, 15}
    assert starts[15]["add_noise"] == "enable" and "denoise" not in starts[15]
    assert not any(n["class_type"] == "KSampler" for n in changed.values())


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
