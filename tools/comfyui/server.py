"""Run graphs in a real ComfyUI: start it as a server on a scratch folder, send graphs, get images.

The user's own ComfyUI folder is only read: the server gets a temporary base directory with its own ``input``,
``output``, ``user`` and ``custom_nodes``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from .install import (
    PACK_NAME,
    PACK_ROOT,
    ComfyError,
    ComfyInstall,
    find_comfyui,
    free_port,
    link_pack,
    stop_process,
    unlink_pack,
)
from .result import RemoteImage, RunResult, refusal, result_of

__all__ = ["ComfyError", "ComfyInstall", "ComfyServer", "RemoteImage", "RunResult", "find_comfyui"]


class ComfyServer:
    """A ComfyUI running on this machine for as long as the ``with`` block lasts.

    Args:
        install: which ComfyUI, see :func:`find_comfyui`.
        pack: the folder of a node pack to load; None runs a plain ComfyUI. Packs of the user are never loaded.
        gpu: use the graphics card; the processor otherwise.
        base: keep input, output and logs here; a temporary folder that vanishes otherwise.
        arguments: more command line arguments for ComfyUI.
        environment: more environment variables.
        start_timeout: seconds to wait until it answers.
    """

    def __init__(
        self,
        install: ComfyInstall,
        pack: Path | None = PACK_ROOT,
        *,
        gpu: bool = False,
        base: Path | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        start_timeout: float = 180.0,
    ) -> None:
        self.install = install
        self.pack = pack
        self.gpu = gpu
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.url = ""
        self._given_base = base
        self._base: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # -- life of the process ------------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self._base = Path(self._given_base or tempfile.mkdtemp(prefix="retrace_comfyui_"))
        try:
            for name in ("custom_nodes", "models", "input", "output", "user", "temp"):
                (self.base / name).mkdir(parents=True, exist_ok=True)
            if self.pack is not None:
                link_pack(self.pack, self.base / "custom_nodes" / PACK_NAME)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def base(self) -> Path:
        """The base directory of the server."""
        if self._base is None:
            raise ComfyError("The ComfyUI server is not running: use it inside a 'with' block.")
        return self._base

    @property
    def log(self) -> str:
        """Everything that ComfyUI printed so far."""
        file = self.base / "comfyui.log"
        return file.read_text("utf-8", errors="replace") if file.exists() else ""

    def _start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self.install.python), "main.py", "--port", str(port), "--base-directory", str(self.base)]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        command += [] if self.gpu else ["--cpu"]
        # A process group of its own: closing takes along whatever ComfyUI started.
        group: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if os.name == "nt"
            else {"start_new_session": True}
        )
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", **self.environment}
        # Variables that point this Python at its own packages would mislead the other one.
        for name in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"):
            environment.pop(name, None)
        with (self.base / "comfyui.log").open("wb") as log:
            self._process = subprocess.Popen(
                command + self.arguments, cwd=self.install.path, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, **group,
            )  # fmt: skip
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ComfyError(f"ComfyUI {self._who} stopped while it started. Its last lines:\n{self._tail()}")
            with contextlib.suppress(requests.RequestException, ComfyError):
                self._send("GET", "/system_stats", timeout=2)
                return
            time.sleep(0.2)
        raise ComfyError(
            f"ComfyUI {self._who} did not answer in {self.start_timeout:.0f} s. Its last lines:\n{self._tail()}"
        )

    def close(self) -> None:
        """Stop the server and remove its temporary folder; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            stop_process(process)
        base, self._base = self._base, None
        if base is not None:
            unlink_pack(base / "custom_nodes" / PACK_NAME)
            if self._given_base is None:
                shutil.rmtree(base, ignore_errors=True)

    @property
    def _who(self) -> str:
        return f"{self.install.version} in '{self.install.path}'".strip()

    def _tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    # -- requests -----------------------------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "", timeout: float = 60.0
    ) -> bytes:
        """One HTTP request to the server; its answer's body.

        Raises:
            ComfyError: it answered 400 or above, or not at all; then it is said whether it still runs.
        """
        headers = {"Content-Type": content_type} if content_type else {}
        return self._answer(method, path, data=body, headers=headers, timeout=timeout)

    def _answer(self, method: str, path: str, **content: Any) -> bytes:
        try:
            return self._send(method, path, **content)
        except requests.RequestException as error:
            raise ComfyError(
                f"ComfyUI {self._who} gave no answer to {path.partition('?')[0]} ({error}): {self._state()}. "
                f"Its last lines:\n{self._tail()}"
            ) from error

    def _state(self) -> str:
        if self._process is None:
            return "it was stopped"
        with contextlib.suppress(subprocess.TimeoutExpired):  # a connection breaks shortly before its process is gone
            self._process.wait(2)
        status = self._process.poll()
        return "it still runs" if status is None else f"its process ended with status {status}"

    def _send(self, method: str, path: str, *, timeout: float = 60.0, **content: Any) -> bytes:
        with requests.Session() as session:
            session.trust_env = False  # no proxy for this machine itself, whatever the environment says
            answer = session.request(method, self.url + path, timeout=timeout, **content)
        if answer.status_code >= 400:
            raise refusal(path, answer.status_code, answer.content)
        return answer.content

    def get_json(self, path: str) -> Any:
        content = self.request("GET", path)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ComfyError(f"ComfyUI {self._who} answered {path} with something other than JSON.") from error

    def object_info(self) -> dict[str, Any]:
        """All nodes that the server knows, by class name."""
        info: dict[str, Any] = self.get_json("/object_info")
        return info

    def upload_image(self, path: Path | str, name: str | None = None) -> str:
        """Put an image into ComfyUI's input folder; returns the name for a Load Image node."""
        path = Path(path)
        file = (name or path.name, path.read_bytes())
        answer = json.loads(self._answer("POST", "/upload/image", files={"image": file}, data={"overwrite": "true"}))
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    def run(
        self,
        graph: dict[str, Any],
        *,
        timeout: float = 600.0,
        on_wait: Callable[[float], None] | None = None,
    ) -> RunResult:
        """Run a graph in API format and wait for it.

        ``on_wait`` is called now and then with the seconds that passed.

        Raises:
            ComfyError: the graph was refused, a node failed (its id, type and message are named), the server ended, or
                the time is over; the graph is then interrupted.
        """
        started = time.monotonic()
        prompt_id = self._queue(graph)
        while True:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry.get("status") is not None:
                return result_of(self, graph, entry, time.monotonic() - started)
            if self._process is None or self._process.poll() is not None:
                raise ComfyError(f"ComfyUI {self._who} ended while the graph ran. Its last lines:\n{self._tail()}")
            if time.monotonic() - started > timeout:
                self._answer("POST", "/interrupt", json={})
                raise ComfyError(f"The graph was not done after {timeout:.0f} s and was interrupted.\n{self._tail()}")
            if on_wait is not None:
                on_wait(time.monotonic() - started)
            time.sleep(0.1)

    def _queue(self, graph: dict[str, Any]) -> str:
        """Send a graph; returns its id in the queue and in the history."""
        # Not as `json=`: requests refuses NaN, which a test may want to see refused by a node.
        answer = json.loads(self.request("POST", "/prompt", json.dumps({"prompt": graph}).encode(), "application/json"))
        prompt_id = str(answer["prompt_id"])
        if answer.get("node_errors"):
            # Some outputs are wrong and ComfyUI would run the others: half a result is no result.
            self._answer("POST", "/queue", json={"delete": [prompt_id]})
            self._answer("POST", "/interrupt", json={"prompt_id": prompt_id})
            raise refusal("/prompt", 400, json.dumps(answer).encode())
        return prompt_id
