"""The demo through a ComfyUI: the shipped example graph, run by that ComfyUI as a server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .hosts.comfyui_install import ComfyError, ComfyInstall

if TYPE_CHECKING:
    from .standalone import Job, Outcome


def run_in_comfyui(install: ComfyInstall, options: argparse.Namespace, job: Job) -> Outcome:
    """Run the example graph on ``job`` in ``install``; raises :class:`ComfyError` when that is not possible."""
    raise ComfyError("this version has no example graph for machines (workflows/api/invert_and_blend.json)")
