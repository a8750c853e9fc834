"""Retrace: edit real photographs in ComfyUI. Nothing is imported before ComfyUI asks for the nodes."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes of this pack (a ``ComfyExtension``)."""
    from .nodes import RetraceExtension

    return RetraceExtension()
