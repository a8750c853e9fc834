"""Drag Points as a person uses it: place, move, undo, paint, reload, copy, run; in both renderers of the frontend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from drag_points_person import ANOTHER_SOURCE, BUILD, HEIGHT, NODES, READY, WIDTH, Person, pixel, run_graph
from PIL import Image, ImageDraw

from retrace.core.errors import InvalidPoints
from retrace.drag.area import movable_area
from retrace.drag.points import parse_points
from tools.comfyui.server import ComfyServer

BAR = 32  # the width of the mask, in pixels
PLACES = {"mask": (0.03, 0.5), "brush": (0.47, 0.5), "eraser": (0.6, 0.5), "nothing": (0.47, 0.05)}
PHOTO = "drag photo.png"


@pytest.fixture(scope="module")
def photo(comfyui: ComfyServer, frontend: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A picture whose mask (its transparency) is a bar at the left, in the folder of Load Image while these tests run.

    Afterwards it is gone, also from the choices of Load Image: to other tests a fresh user has no pictures.
    """
    ramp = np.linspace(0, 255, WIDTH, dtype=np.uint8)[None].repeat(HEIGHT, 0)
    picture = Image.fromarray(np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 90)], -1)).convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    ImageDraw.Draw(alpha).rectangle((0, 0, BAR - 1, HEIGHT), fill=0)
    picture.putalpha(alpha)
    file = tmp_path_factory.mktemp("drag") / PHOTO
    picture.save(file)
    yield comfyui.upload_image(file)
    (comfyui.base / "input" / PHOTO).unlink()
    frontend.evaluate("app.refreshComboInNodes()")


@pytest.fixture
def classic(frontend: Any, photo: str) -> Any:
    frontend.problems.clear()
    frontend.evaluate(BUILD, photo)
    return frontend


@pytest.mark.parametrize("renderer", ["frontend", "vue_frontend"])
def test_what_a_person_does_from_the_first_point_to_the_result(
    renderer: str, request: pytest.FixtureRequest, comfyui: ComfyServer, photo: str
) -> None:
    page = request.getfixturevalue(renderer)
    page.problems.clear()
    page.evaluate(BUILD, photo)
    person = Person(page)
    person.sees_the_picture()  # before anything was queued
    _place_move_undo(person)
    _use_the_keyboard(person)
    _paint(person)
    _run_and_compare(person, comfyui)
    _reload_and_copy(person)
    _type_text(person)
    assert page.problems == []


def _place_move_undo(person: Person) -> None:
    person.drag((0.3, 0.4), (0.5, 0.2))  # by pressing and dragging
    person.click(0.6, 0.6)
    person.click(0.8, 0.75)  # by two clicks
    first, second = person.value["points"]
    assert first == {"handle": pixel(0.3, 0.4), "target": pixel(0.5, 0.2)}
    assert second == {"handle": pixel(0.6, 0.6), "target": pixel(0.8, 0.75)}
    person.drag((0.8, 0.75), (0.9, 0.9))
    assert person.value["points"] == [first, {**second, "target": pixel(0.9, 0.9)}]
    person.page.keyboard.press("Control+z")
    assert person.value["points"] == [first, second]
    person.page.keyboard.press("Control+Shift+z")
    assert person.value["points"][1]["target"] == pixel(0.9, 0.9)
    person.page.wait_for_timeout(200)  # the frontend's own undo would act in the next frame
    assert person.value["points"][1]["target"] == pixel(0.9, 0.9)
    person.click(0.6, 0.6, button="right")
    assert person.value["points"] == [first]
    person.press("Undo")
    assert len(person.value["points"]) == 2


def _use_the_keyboard(person: Person) -> None:
    keyboard, nodes = person.page.keyboard, "app.graph._nodes.length"
    person.canvas.focus()
    for _ in range(4):
        keyboard.press("Tab")  # handle, target, handle, target
    before = person.page.evaluate(nodes)
    keyboard.press("Shift+ArrowLeft")
    keyboard.press("ArrowUp")
    assert person.value["points"][1]["target"] == pixel(0.9 - 10 / WIDTH, 0.9 - 1 / HEIGHT)
    assert person.status.text_content().startswith("Point 2 of 2, target: x 278, y 179 px")
    keyboard.press("Tab")
    assert person.canvas.evaluate("canvas => document.activeElement !== canvas"), "the last Tab leaves the picture"
    person.canvas.focus()
    keyboard.press("[")  # backwards from nothing: the last target
    keyboard.press("Delete")
    keyboard.press("Delete")  # once too often: never the node itself
    assert len(person.value["points"]) == 1 and person.page.evaluate(nodes) == before


def _paint(person: Person) -> None:
    person.press("Brush")
    person.drag((0.4, 0.5), (0.6, 0.5), (0.6, 0.8))
    person.press("Erase")
    person.drag((0.6, 0.5), (0.62, 0.5))
    strokes = person.value["strokes"]
    assert [stroke.get("erase", False) for stroke in strokes] == [False, True]
    assert len(strokes[0]["points"]) == 3, "the path is thinned to its corners"
    person.press("Points")


def _run_and_compare(person: Person, comfyui: ComfyServer) -> None:
    text = person.text
    entry = run_graph(person.page, comfyui)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (sent,) = (node["inputs"] for node in entry["prompt"][2].values() if node["class_type"] == "RetraceDragPoints")
    assert sent["points"] == text
    (shown,) = (output["images"][0] for output in entry["outputs"].values() if "images" in output)
    picture = Image.open(comfyui.base / "temp" / shown["subfolder"] / shown["filename"]).convert("L")
    result = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, :BAR] = 1
    (area,) = movable_area(parse_points(text)[1], HEIGHT, WIDTH, mask)
    torch.testing.assert_close(result, area, rtol=0, atol=1.01 / 255)
    at = {name: area[round(y * HEIGHT), round(x * WIDTH)].item() for name, (x, y) in PLACES.items()}
    assert at == {"mask": 1, "brush": 1, "eraser": 0, "nothing": 0}


def _reload_and_copy(person: Person) -> None:
    page, text = person.page, person.text
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    (node,) = (node for node in json.loads(saved)["nodes"] if node["type"] == "RetraceDragPoints")
    assert node["widgets_values"] == [text]
    assert "data:" not in saved and "blob:" not in saved

    page.wait_for_timeout(1500)  # until the frontend has kept the workflow
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(f"{READY} && {NODES}.length === 1", timeout=60_000)
    person.sees_the_picture()
    assert person.text == text

    page.evaluate(
        f"""() => {{ const [node] = {NODES}; app.canvas.selectItems([node]); app.canvas.copyToClipboard([node]);
        app.canvas.pasteFromClipboard(); }}"""
    )
    page.wait_for_function("document.querySelectorAll('.retrace-drag').length === 2")
    copy = Person(page, 1)
    assert copy.text == text
    copy.set_text("[[0.1, 0.1, 0.2, 0.2]]")
    assert person.text == text
    page.evaluate(f"app.graph.remove({NODES}[1])")


def _type_text(person: Person) -> None:
    person.set_text('{"points": [[0.1, 0.2, 0.3, 0.4]]}')
    assert person.status.text_content().startswith("1 point.")
    person.set_text("{oops")
    assert "not valid JSON" in person.status.text_content()
    person.drag((0.3, 0.4), (0.5, 0.2))
    person.canvas.press("Delete")
    assert person.text == "{oops", "a text that cannot be read is not destroyed"
    assert person.page.locator("textarea:visible").count() == 0
    person.press("JSON")
    text = person.page.locator("textarea:visible")
    text.wait_for(timeout=5_000)
    assert text.input_value() == "{oops"
    text.fill("[[0.5, 0.5, 0.75, 0.5]]")
    assert person.text == "[[0.5, 0.5, 0.75, 0.5]]" and person.status.text_content().startswith("1 point.")
    person.drag((0.5, 0.5), (0.25, 0.5))
    assert person.value["points"] == [{"handle": pixel(0.25, 0.5), "target": [0.75, 0.5]}]
    assert text.input_value() == person.text
    person.press("Clear")
    assert person.text == "" and "Press on what should move" in person.status.text_content()


def test_a_zoomed_graph_and_a_resized_node_keep_the_places(classic: Any) -> None:
    person = Person(classic)
    person.sees_the_picture()
    person.drag((0.25, 0.25), (0.75, 0.75))
    text = person.text
    classic.evaluate("app.canvas.ds.scale = 1.6; app.canvas.ds.offset = [-250, -60]; app.canvas.setDirty(true, true)")
    classic.evaluate(f"{NODES}[0].setSize([520, 430])")
    classic.wait_for_timeout(700)
    assert person.text == text
    sharp = "c => c.width / c.getBoundingClientRect().width"
    assert person.canvas.evaluate(sharp) == pytest.approx(1, abs=0.01)
    person.drag((0.75, 0.75), (0.5, 0.75))
    person.drag((0.9, 0.1), (0.95, 0.2))
    assert person.value["points"] == [
        {"handle": pixel(0.25, 0.25), "target": pixel(0.5, 0.75)},
        {"handle": pixel(0.9, 0.1), "target": pixel(0.95, 0.2)},
    ]


def test_the_undo_of_the_graph_takes_back_one_edit(classic: Any) -> None:
    person = Person(classic)
    person.sees_the_picture()
    person.drag((0.25, 0.25), (0.75, 0.75))
    one = person.text
    person.drag((0.5, 0.25), (0.75, 0.25))
    assert len(person.value["points"]) == 2
    classic.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    classic.wait_for_function(f"text => {NODES}[0]?.widgets[0].value === text", arg=one)
    person.sees_the_picture()
    assert person.status.text_content().startswith("1 point.")


def test_another_source_shows_after_a_run_that_fails_for_lack_of_points(classic: Any, comfyui: ComfyServer) -> None:
    classic.evaluate(ANOTHER_SOURCE)
    classic.locator(".retrace-drag-note").filter(has_text="after the first run").wait_for(timeout=10_000)
    entry = run_graph(classic, comfyui)
    assert entry["status"]["status_str"] == "error" and "there are no points" in json.dumps(entry["status"])
    person = Person(classic)
    person.sees_the_picture()
    classic.keyboard.press("Escape")  # the frontend's own dialog about the error
    classic.evaluate("document.querySelectorAll('.p-dialog-mask').forEach(dialog => dialog.remove())")
    person.drag((0.25, 0.25), (0.75, 0.75))
    assert run_graph(classic, comfyui)["status"]["status_str"] == "success"
    classic.problems.clear()  # the error that was asked for


def test_the_picture_of_a_failed_run_goes_to_no_node_with_the_same_number(classic: Any, photo: str) -> None:
    Person(classic).sees_the_picture()
    classic.evaluate(ANOTHER_SOURCE)
    host, inner = classic.evaluate(
        f"""() => {{
          const nodes = app.graph._nodes.filter(n => ['RetraceDragPoints', 'MaskToImage'].includes(n.type));
          app.canvas.selectItems(nodes);
          app.canvas.graph.convertToSubgraph(app.canvas.selectedItems);
          const host = app.graph._nodes.find(n => n.subgraph);
          app.canvas.setGraph(host.subgraph);
          app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0];
          return [host.id, {NODES}[0].id]; }}"""
    )
    waiting = classic.locator(".retrace-drag-note").filter(has_text="after the first run")
    waiting.wait_for(timeout=10_000)
    failed = """async ([node, filename]) => { const { api } = await import('/scripts/api.js');
      const detail = { node, retrace_picture: [{ filename, subfolder: '', type: 'input' }] };
      api.dispatchEvent(new CustomEvent('retrace.drag_points', { detail })); }"""
    for other in (f"{inner}", f"1{host}:{inner}", f"{host}:{host}:{inner}"):
        classic.evaluate(failed, [other, photo])
        classic.wait_for_timeout(600)
        assert waiting.is_visible(), other
    classic.evaluate(failed, [f"{host}:{inner}", photo])
    Person(classic).sees_the_picture()
    classic.evaluate(
        """host => { const root = app.rootGraph ?? app.graph.rootGraph;
        app.canvas.setGraph(root); root.remove(root.getNodeById(host)); }""",
        host,
    )
    classic.wait_for_function("document.querySelectorAll('.retrace-drag').length === 0")


def test_inside_a_subgraph_the_picture_from_outside_shows(classic: Any) -> None:
    Person(classic).sees_the_picture()
    inner = classic.evaluate(
        f"""async () => {{
          const nodes = app.graph._nodes.filter(n => ['RetraceDragPoints', 'MaskToImage'].includes(n.type));
          {NODES}[0].widgets[0].value = '[[0.3, 0.3, 0.6, 0.6]]';
          app.canvas.selectItems(nodes);
          app.canvas.graph.convertToSubgraph(app.canvas.selectedItems);
          const host = app.graph._nodes.find(n => n.subgraph);
          const prompt = Object.values((await app.graphToPrompt()).output);
          app.canvas.setGraph(host.subgraph);
          app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0];
          return prompt.find(n => n.class_type === 'RetraceDragPoints').inputs.points; }}"""
    )
    assert inner == "[[0.3, 0.3, 0.6, 0.6]]"
    person = Person(classic)
    classic.wait_for_function("document.querySelectorAll('.retrace-drag').length === 1")
    person.sees_the_picture()
    assert person.status.text_content().startswith("1 point.")
    promoted = classic.evaluate(
        """async () => { const graph = app.canvas.graph, node = graph.nodes.find(n => n.type === 'RetraceDragPoints');
          const slot = node.inputs.findIndex(i => i.name === 'points');
          graph.addInput('points', 'STRING').connect(node.inputs[slot], node);
          const root = app.rootGraph ?? app.graph.rootGraph, host = root.nodes.find(n => n.subgraph === graph);
          host.widgets.find(w => w.name === 'points').value = '[[0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1]]';
          const prompt = Object.values((await app.graphToPrompt()).output);
          return prompt.find(n => n.class_type === 'RetraceDragPoints').inputs.points; }"""
    )
    assert promoted == "[[0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1]]"
    person.status.filter(has_text="come from outside").wait_for(timeout=5_000)
    person.drag((0.5, 0.5), (0.7, 0.5))
    assert person.text == "[[0.3, 0.3, 0.6, 0.6]]", "what comes from outside is not edited here"
    classic.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph.rootGraph)")


TEXTS = [
    "",
    " {} ",
    "[]",
    "[[0, 0, 1, 1]]",
    "[[[0.5, 0.5], [1, 0]]]",
    '{"points": [{"handle": [0.2, 0.3], "target": [0.4, 0.5]}], "strokes": [{"points": [[0, 1]], "radius": 0.1}]}',
    '{"strokes": [{"points": [[0, 0], [1, 1]], "radius": 1, "erase": true}]}',
    "nonsense",
    "3",
    "null",
    '{"points": 5}',
    '{"points": null}',
    '[{"handle": [0.5, 0.5]}]',
    "[[0.5, 1.5, 0, 0]]",
    "[[0.5, true, 0, 0]]",
    '[[0.5, "0.5", 0, 0]]',
    "[[0.5, NaN, 0, 0]]",
    "[[0.5, 0.5, 0.5]]",
    json.dumps([[0, 0, 1, 1]] * 101),
    '{"strokes": [{"points": [], "radius": 0.1}]}',
    '{"strokes": [{"points": [[0, 0]], "radius": 0}]}',
    '{"strokes": [{"points": [[0, 0]], "radius": true}]}',
]


def test_the_browser_and_the_node_read_the_same_texts(classic: Any) -> None:
    read = classic.evaluate(
        """async (texts) => { const value = await import('/extensions/ComfyUI-Retrace/drag_points/value.js');
          return texts.map(text => { try { return value.write(value.read(text)) } catch { return null } }); }""",
        TEXTS,
    )
    for text, written in zip(TEXTS, read, strict=True):
        try:
            expected = parse_points(text)
        except InvalidPoints:
            assert written is None, text
        else:
            assert written is not None, text
            assert parse_points(written) == expected
