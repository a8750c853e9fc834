"""Find a ComfyUI on this machine and the Python that runs it; links and processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACK_NAME = "ComfyUI-Retrace"
PACK_ROOT = Path(__file__).absolute().parents[2]
# What a copied pack does not need (a linked one brings everything).
_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "venv", "__pycache__", ".*_cache", "output", "tests", "benchmarks"
)


class ComfyError(RuntimeError):
    """ComfyUI did not start, refused a graph, or a node failed; ``node_id`` and ``node_type`` name it where known."""

    def __init__(self, message: str, node_id: str = "", node_type: str = "", exception_type: str = "") -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.exception_type = exception_type


@dataclass(frozen=True)
class ComfyInstall:
    """A ComfyUI folder, the Python that runs it, and its version (``""`` when it says none)."""

    path: Path
    python: Path
    version: str

    @classmethod
    def at(cls, path: Path) -> ComfyInstall | None:
        """The ComfyUI in ``path``, or None when there is none."""
        path = path.expanduser().absolute()
        if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
            return None
        return cls(path, _python_of(path), _version_of(path))


def _python_of(path: Path) -> Path:
    """The Python of a ComfyUI: COMFYUI_PYTHON, its own virtual environment, the portable one beside it, or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    places = [path / env / exe for env in (".venv", "venv") for exe in ("bin/python", "Scripts/python.exe")]
    places.append(path.parent / "python_embeded" / "python.exe")  # spelled like this in the portable Windows build
    return next((p for p in places if p.is_file()), Path(sys.executable))


def _version_of(path: Path) -> str:
    file = path / "comfyui_version.py"
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        if line.startswith("__version__"):
            return line.partition("=")[2].strip().strip("\"'")
    return ""


def find_comfyui() -> ComfyInstall | None:
    """The ComfyUI to use: ``COMFYUI_PATH``, the one whose custom_nodes holds this pack, or ``~/ComfyUI``; else None.

    Raises:
        ComfyError: COMFYUI_PATH is set and holds no ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        install = ComfyInstall.at(Path(named))
        if install is None:
            raise ComfyError(f"COMFYUI_PATH is '{named}', but there is no ComfyUI (no main.py with a comfy folder).")
        return install
    places = [Path.home() / "ComfyUI"]
    if PACK_ROOT.parent.name == "custom_nodes":
        places.insert(0, PACK_ROOT.parent.parent)
    return next((install for install in map(ComfyInstall.at, places) if install is not None), None)


def link_pack(pack: Path, place: Path) -> None:
    """Make ``pack`` visible at ``place``: a link, or a copy where links are not allowed (Windows without the right)."""
    unlink_pack(place)
    if place.exists():  # a real folder is somebody's own: never replaced
        return
    try:
        place.symlink_to(pack.absolute(), target_is_directory=True)
    except OSError:
        shutil.copytree(pack, place, ignore=_NOT_COPIED)


def unlink_pack(place: Path) -> None:
    """Remove a link itself, so that nothing behind it can be deleted along with the folder."""
    if place.is_symlink():
        with contextlib.suppress(OSError):
            place.unlink()


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, with everything that it started."""
    if process.poll() is None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        if os.name != "nt":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
