"""Someone before the node Drag Points: a graph with it on the canvas, a mouse, a keyboard and the Run button."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.comfyui.server import ComfyServer

WIDTH, HEIGHT = 320, 200  # of the picture under the points
BUILD = """async (photo) => {
  app.graph.clear()
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type)
    node.pos = [x, y]
    app.graph.add(node)
    return node
  }
  const load = add('LoadImage', 40, 120), drag = add('RetraceDragPoints', 400, 100)
  const image = add('MaskToImage', 860, 100), show = add('PreviewImage', 1100, 100)
  load.widgets.find(w => w.name === 'image').value = photo
  drag.widgets.find(w => w.name === 'points').value = '' // the frontend remembers values by the number of a node
  load.connect(0, drag, 0)
  load.connect(1, drag, 1)
  drag.connect(1, image, 0)
  image.connect(0, show, 0)
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [0, 0]
  app.canvas.setDirty(true, true)
}"""
NODES = "app.canvas.graph._nodes.filter(n => n.type === 'RetraceDragPoints')"
ANOTHER_SOURCE = f"""() => {{
  const empty = LiteGraph.createNode('EmptyImage'); empty.pos = [40, 500]; app.graph.add(empty);
  empty.widgets.find(w => w.name === 'width').value = {WIDTH};
  empty.widgets.find(w => w.name === 'height').value = {HEIGHT};
  {NODES}[0].disconnectInput(1); empty.connect(0, {NODES}[0], 0); }}"""
READY = "!!window.app?.graph && !!window.LiteGraph?.registered_node_types['RetraceDragPoints']"


class Person:
    """Someone with a mouse and a keyboard before the node."""

    def __init__(self, page: Any, which: int = 0) -> None:
        self.page, self.which = page, which
        self.canvas = page.locator(".retrace-drag canvas").nth(which)
        self.status = page.locator(".retrace-drag-status").nth(which)

    @property
    def text(self) -> str:
        return str(self.page.evaluate(f"{NODES}[{self.which}].widgets.find(w => w.name === 'points').value"))

    @property
    def value(self) -> Any:
        return json.loads(self.text) if self.text else {"points": []}

    def set_text(self, text: str) -> None:
        script = f"text => {{ {NODES}[{self.which}].widgets.find(w => w.name === 'points').value = text }}"
        self.page.evaluate(script, text)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the picture is on the screen: it lies in the middle, as large as it fits."""
        box = self.canvas.bounding_box()
        scale = min((box["width"] - 4) / WIDTH, (box["height"] - 4) / HEIGHT)
        left = box["x"] + (box["width"] - WIDTH * scale) / 2
        top = box["y"] + (box["height"] - HEIGHT * scale) / 2
        return left + x * WIDTH * scale, top + y * HEIGHT * scale

    def drag(self, *places: tuple[float, float]) -> None:
        self.page.mouse.move(*self.at(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.at(*place), steps=3)
        self.page.mouse.up()

    def click(self, x: float, y: float, button: str = "left") -> None:
        self.page.mouse.click(*self.at(x, y), button=button)

    def press(self, name: str) -> None:
        self.page.locator(".retrace-drag").nth(self.which).get_by_role("button", name=name).click()

    def sees_the_picture(self) -> None:
        self.page.wait_for_function(
            "i => document.querySelectorAll('.retrace-drag-note')[i]?.textContent === ''"
            " && document.querySelectorAll('.retrace-drag canvas')[i].className !== 'idle'",
            arg=self.which,
            timeout=20_000,
        )


def pixel(x: float, y: float) -> list[object]:
    return [pytest.approx(x, abs=1.5 / WIDTH), pytest.approx(y, abs=1.5 / HEIGHT)]


def run_graph(page: Any, comfyui: ComfyServer) -> dict[str, Any]:
    """Queue the graph as the Run button does; the entry of its end in the history."""
    before = set(comfyui.get_json("/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    for _ in range(300):
        for key, entry in comfyui.get_json("/history").items():
            if key not in before:
                return dict(entry)
        page.wait_for_timeout(100)
    raise AssertionError(f"the run did not end: {comfyui.log[-2000:]}")
