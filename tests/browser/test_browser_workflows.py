"""What a person does with the shipped graphs: open them, see no red node, press Run, see the result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools.comfyui.server import ComfyServer

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OPEN = """async (graph) => {
  await app.loadGraphData(graph, true, true, 'test');
  await new Promise(done => setTimeout(done, 500));
  const missing = app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type);
  return { missing, prompt: (await app.graphToPrompt()).output, nodes: app.graph._nodes.length };
}"""


def _open(page: Any, path: Path) -> dict[str, Any]:
    opened: dict[str, Any] = page.evaluate(OPEN, json.loads(path.read_text("utf-8")))
    return opened


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_opens_without_missing_nodes_and_means_its_api_twin(frontend: Any, path: Path) -> None:
    opened = _open(frontend, path)
    assert opened["missing"] == []
    twin = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    inputs = {key: (node["class_type"], node["inputs"]) for key, node in opened["prompt"].items()}
    assert inputs == {key: (node["class_type"], node["inputs"]) for key, node in twin.items()}
    assert frontend.problems == []


def test_the_script_is_loaded_once(comfyui: ComfyServer) -> None:
    scripts = [path for path in comfyui.get_json("/extensions") if path.endswith("/report.js")]
    assert scripts == ["/extensions/ComfyUI-Retrace/report.js"]


def test_help_pages_and_names_reach_the_browser(frontend: Any, comfyui: ComfyServer) -> None:
    title = frontend.evaluate("LiteGraph.createNode('RetraceDDIMInverter').title")
    assert title == "DDIM Inverter"
    page = frontend.request.get(comfyui.url + "/extensions/ComfyUI-Retrace/docs/RetraceDDIMInverter.md")
    assert page.ok


def test_reports_stay_out_of_the_saved_workflow(frontend: Any) -> None:
    saved = frontend.evaluate(
        """() => { app.graph.clear(); const n = LiteGraph.createNode('RetraceEditReport'); app.graph.add(n);
        return { values: app.graph.serialize().nodes[0].widgets_values, widgets: n.widgets.map(w => w.name) }; }"""
    )
    assert "retrace_report" in saved["widgets"]
    values = saved["values"]
    assert "The report" not in json.dumps(values)


def test_run_shows_the_edit_and_its_report(frontend: Any, comfyui: ComfyServer) -> None:
    folder = Path(os.environ.get("RETRACE_PEBBLE") or ROOT / "retrace" / "models" / "pebble" / "weights")
    if not folder.is_dir():
        pytest.skip(f"Pebble has no weights in '{folder}'")
    _open(frontend, ROOT / "workflows" / "invert_and_blend.json")
    before = set(comfyui.get_json("/history"))
    frontend.evaluate(
        """async () => {
          for (const n of app.graph._nodes) for (const w of n.widgets ?? []) if (w.name === 'steps') w.value = 4;
          await app.queuePrompt(0, 1);
        }"""
    )
    frontend.wait_for_function(
        """() => app.graph._nodes.filter(n => n.type === 'RetraceEditReport')
          .every(n => n.widgets.find(w => w.name === 'retrace_report').element.textContent.includes('mask area'))""",
        timeout=180_000,
    )
    frontend.wait_for_function(
        "() => app.graph._nodes.filter(n => n.type === 'SaveImage').every(n => n.imgs?.length === 1)", timeout=30_000
    )
    report = frontend.evaluate(
        """() => app.graph._nodes.find(n => n.type === 'RetraceDDIMInverter')
          .widgets.find(w => w.name === 'retrace_report').element.textContent"""
    )
    assert "network evaluations" in report
    (entry,) = (entry for key, entry in comfyui.get_json("/history").items() if key not in before)
    assert entry["status"]["status_str"] == "success"
    assert frontend.problems == []


def test_the_report_shows_in_the_newer_renderer_too(vue_frontend: Any) -> None:
    vue_frontend.evaluate(
        """async () => {
          await app.loadApiJson({
            1: { class_type: 'RetracePebbleScene', inputs: { index: 3, objects: 1, margin: 0 } },
            2: { class_type: 'RetraceEditReport',
                 inputs: { edited: ['1', 0], source: ['1', 0], mask: ['1', 1], lpips: false } },
          }, 'test');
          await app.queuePrompt(0, 1);
        }"""
    )
    shown = vue_frontend.locator("pre", has_text="identical in 8 bits")
    shown.wait_for(state="visible", timeout=60_000)
    assert vue_frontend.problems == []
