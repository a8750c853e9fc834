"""The type check sees from a node into the library: a setting of the wrong type does not get past it."""

from __future__ import annotations

import subprocess

import pytest

from tools import check_types

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow

NAME = "_settings_of_a_test.py"
NODE = """\
from ..retrace.drag.latent.settings import DragSettings

DragSettings(mode={mode!r}, stop_radius={radius!r})
"""


def checked(mode: object, radius: object) -> subprocess.CompletedProcess[str]:
    """What mypy says of a file beside the nodes that passes these settings."""
    file = check_types.stage({f"nodes/{NAME}": NODE.format(mode=mode, radius=radius)}) / "nodes" / NAME
    try:
        return check_types.check("--follow-imports=silent", str(file.relative_to(check_types.ROOT)))
    finally:
        file.unlink()


def test_wrong_settings_from_a_node_fail_the_check() -> None:
    done = checked("nonsense", "x")
    assert done.returncode == 1, done.stdout + done.stderr
    mode, radius = (line for line in done.stdout.splitlines() if "error:" in line)
    assert f"{NAME}:3: error:" in mode and 'Argument "mode" to "DragSettings"' in mode
    assert f"{NAME}:3: error:" in radius and 'Argument "stop_radius" to "DragSettings"' in radius


def test_right_settings_from_a_node_pass_it() -> None:
    done = checked("gooddrag", 1.5)
    assert done.returncode == 0, done.stdout + done.stderr
