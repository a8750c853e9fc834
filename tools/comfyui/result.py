"""What came out of a graph that a ComfyUI ran, or why nothing did."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .install import ComfyError


class Server(Protocol):
    """Where images are fetched from."""

    def request(self, method: str, path: str) -> bytes: ...


@dataclass
class RemoteImage:
    """An image on the server; fetched when :meth:`read` is called."""

    server: Server = field(repr=False)
    node_id: str
    filename: str
    subfolder: str
    type: str

    def read(self) -> bytes:
        """The file as the server holds it, normally PNG."""
        query = {"filename": self.filename, "subfolder": self.subfolder, "type": self.type}
        return self.server.request("GET", "/view?" + urllib.parse.urlencode(query))

    def save(self, path: Path | str) -> Path:
        path = Path(path)
        path.write_bytes(self.read())
        return path


@dataclass
class RunResult:
    """What came out of a graph.

    ``outputs`` maps node ids to their UI results; ``messages`` are the status messages as ``(event, data)``;
    ``executed_nodes`` ran this time, ``cached_nodes`` were still known; ``images`` were saved or previewed.
    """

    outputs: dict[str, dict[str, Any]]
    messages: list[tuple[str, dict[str, Any]]]
    executed_nodes: list[str]
    cached_nodes: list[str]
    images: list[RemoteImage]
    seconds: float

    def images_of(self, node_id: str) -> list[RemoteImage]:
        return [image for image in self.images if image.node_id == node_id]

    def text_of(self, node_id: str) -> str:
        """The text that a node shows, for example that of a report."""
        return "\n".join(str(part) for part in self.outputs.get(node_id, {}).get("text", ()))


def result_of(server: Server, graph: dict[str, Any], entry: dict[str, Any], seconds: float) -> RunResult:
    """What the ``entry`` of a graph in the server's history says; raises :class:`ComfyError` where a node failed."""
    messages = [(str(name), data) for name, data in entry["status"].get("messages", [])]
    for event, data in messages:
        if event == "execution_error":
            kind = str(data["exception_type"]).rpartition(".")[2]
            raise ComfyError(
                f"Node {data['node_id']} ({data['node_type']}) failed with {kind}: "
                f"{str(data['exception_message']).strip()}",
                str(data["node_id"]),
                str(data["node_type"]),
                str(data["exception_type"]),
            )
        if event == "execution_interrupted":
            raise ComfyError(f"The graph was interrupted at node {data.get('node_id')} ({data.get('node_type')}).")
    cached = [node for event, data in messages if event == "execution_cached" for node in data.get("nodes", [])]
    images = [
        RemoteImage(server, node, image["filename"], image.get("subfolder", ""), image["type"])
        for node, output in entry["outputs"].items()
        for image in output.get("images", ())
        if image
    ]
    executed = [node for node in graph if node not in cached]
    return RunResult(entry["outputs"], messages, executed, cached, images, seconds)


def refusal(path: str, code: int, body: bytes) -> ComfyError:
    """The error for an HTTP answer ``code``; a refused graph names the first node that is wrong, and lists all."""
    text = body.decode("utf-8", errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return ComfyError(f"ComfyUI answered {code} to {path}: {text[:500]}")
    if not isinstance(answer, dict):
        return ComfyError(f"ComfyUI answered {code} to {path}: {text[:500]}")
    error: Any = answer.get("error", "some of its outputs cannot run" if "node_errors" in answer else answer)
    reason = f"{error.get('message', '')} {error.get('details', '')}".strip() if isinstance(error, dict) else str(error)
    lines = [
        f"ComfyUI refused the graph: {reason}" if path == "/prompt" else f"ComfyUI answered {code} to {path}: {reason}"
    ]
    nodes: dict[str, dict[str, Any]] = answer.get("node_errors") or {}
    for node_id, problem in nodes.items():
        for part in problem.get("errors", ()):
            lines.append(f"Node {node_id} ({problem.get('class_type')}): {part.get('message')}: {part.get('details')}")
    first_id = next(iter(nodes), "")
    first_type = str(nodes[first_id].get("class_type", "")) if nodes else ""
    return ComfyError("\n".join(lines), first_id, first_type, f"HTTP {code}")
