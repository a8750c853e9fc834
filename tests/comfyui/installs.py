"""Which ComfyUI versions the tests run on, and why something was skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tools.comfyui.server import ComfyInstall, find_comfyui

ROOT = Path(__file__).parents[2]
SKIPPED: dict[str, str] = {}


def _floor() -> ComfyInstall | None:
    return ComfyInstall.at(Path(os.environ.get("COMFYUI_FLOOR_PATH") or Path.home() / "ComfyUI-0.3.64"))


INSTALLS = {"newest": find_comfyui, "floor": _floor}


def install_or_skip(which: str) -> ComfyInstall:
    install = INSTALLS[which]()
    if install is None:
        variable = "COMFYUI_PATH" if which == "newest" else "COMFYUI_FLOOR_PATH"
        skip(which, f"no {which} ComfyUI found; set {variable} to its folder to run the ComfyUI tests with it")
    return install


def skip(key: str, reason: str) -> NoReturn:
    """Skip this test, and say why once more in the last lines of the run."""
    SKIPPED[key] = reason
    pytest.skip(reason)


def pebble_folder() -> Path:
    return Path(os.environ.get("RETRACE_PEBBLE") or ROOT / "retrace" / "models" / "pebble" / "weights")


def pebble_environment() -> dict[str, str]:
    """RETRACE_PEBBLE for a server, where a developer set it."""
    return {name: os.environ[name] for name in ("RETRACE_PEBBLE",) if name in os.environ}
