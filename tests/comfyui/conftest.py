"""Real ComfyUI servers for the tests. Where there is no ComfyUI the tests are skipped, and the last lines say so."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.comfyui.server import ComfyServer

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests find the modules beside them
from installs import INSTALLS, ROOT, SKIPPED, install_or_skip, pebble_environment, pebble_folder, skip


@pytest.fixture(scope="session", params=list(INSTALLS))
def server(request: pytest.FixtureRequest) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack; every test that uses it runs on the newest and on the oldest version."""
    with ComfyServer(install_or_skip(request.param), ROOT, environment=pebble_environment()) as running:
        yield running


@pytest.fixture(scope="session")
def newest_server() -> Iterator[ComfyServer]:
    """Only the newest ComfyUI, for tests that need not run twice."""
    with ComfyServer(install_or_skip("newest"), ROOT, environment=pebble_environment()) as running:
        yield running


@pytest.fixture
def pebble() -> None:
    """Skip where Pebble has no weights."""
    if not pebble_folder().is_dir():
        skip("pebble", f"Pebble has no weights in '{pebble_folder()}'; tests that sample were skipped")


@pytest.fixture
def trained_pebble(pebble: None) -> None:
    """Skip where Pebble's weights are not the trained ones that ship."""
    if "RETRACE_PEBBLE" in os.environ:
        skip("trained", "RETRACE_PEBBLE may name untrained weights; tests of quality were skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason in SKIPPED.values():
        terminalreporter.write_line(f"SKIPPED, ComfyUI layer: {reason}", yellow=True, bold=True)
