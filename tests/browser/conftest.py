"""A real Chromium on a real ComfyUI. Where one of them is missing the tests are skipped, and the last lines say so."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tools.comfyui.server import ComfyServer, find_comfyui

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests find the modules beside them

ROOT = Path(__file__).parents[2]
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_SKIPPED: dict[str, str] = {}


def _skip(key: str, reason: str) -> NoReturn:
    _SKIPPED[key] = reason
    pytest.skip(reason)


@pytest.fixture(scope="session")
def comfyui() -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack, as a fresh user finds it."""
    install = find_comfyui()
    if install is None:
        _skip("comfyui", "no ComfyUI found; set COMFYUI_PATH to its folder")
    environment = {name: os.environ[name] for name in ("RETRACE_PEBBLE",) if name in os.environ}
    with ComfyServer(install, ROOT, environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _skip("playwright", "the package 'playwright' is not installed (pip install playwright)")
    program = os.environ.get("RETRACE_CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        _skip("chromium", "no Chromium found; install it, or set RETRACE_CHROMIUM to its program")
    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=quiet)
        yield browser
        browser.close()


def open_frontend(comfyui: ComfyServer, chromium: Any, **settings: Any) -> Any:
    """A page with the frontend ready under these settings; ``page.problems`` lists errors of scripts."""
    page = chromium.new_page(viewport={"width": 1920, "height": 1080})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if "Retrace" in message.text else None)
    # A fresh user would get the template dialog over the canvas.
    page.request.post(comfyui.url + "/api/settings", data={"Comfy.TutorialCompleted": True, **settings})
    page.goto(comfyui.url, wait_until="domcontentloaded", timeout=120_000)
    page.wait_for_function(
        "!!(window.app && window.app.graph && window.LiteGraph"
        " && window.LiteGraph.registered_node_types['RetraceBlendStep'])",
        timeout=120_000,
    )
    page.wait_for_timeout(1500)
    return page


@pytest.fixture(scope="session")
def frontend(comfyui: ComfyServer, chromium: Any) -> Any:
    """The frontend as a fresh user has it."""
    return open_frontend(comfyui, chromium)


@pytest.fixture
def vue_frontend(comfyui: ComfyServer, chromium: Any) -> Iterator[Any]:
    """The frontend with its newer renderer ("Nodes 2.0"), which draws nodes as HTML."""
    page = open_frontend(comfyui, chromium, **{"Comfy.VueNodes.Enabled": True})
    yield page
    page.request.post(comfyui.url + "/api/settings", data={"Comfy.VueNodes.Enabled": False})
    page.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason in _SKIPPED.values():
        terminalreporter.write_line(f"SKIPPED, browser layer: {reason}", yellow=True, bold=True)
