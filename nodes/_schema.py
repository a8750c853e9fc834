"""Schemas that load on every supported ComfyUI: what an older core does not know is left out."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import comfy.samplers
from comfy_api.latest import io

PREFIX = "Retrace"
_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}

Trajectory = io.Custom("RETRACE_TRAJECTORY")
"""Socket of :class:`Trajectory`."""

ImageText = io.Custom("RETRACE_CLIP")
"""Socket of :class:`retrace.models.clip.model.ImageTextModel`."""

Points = io.Custom("RETRACE_POINTS")
"""Socket of :class:`retrace.drag.points.DragPoints`."""


def schema(family: str, **fields: Any) -> io.Schema:
    """An ``io.Schema`` in the menu ``Retrace/<family>``, without the fields that this ComfyUI does not have."""
    fields["category"] = f"{PREFIX}/{family}"
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def advanced() -> dict[str, bool]:
    """Keyword of an input that is folded away at first, where this ComfyUI can do that."""
    return {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}


def seed_input(tooltip: str, **more: Any) -> Any:
    """The seed of noise that a node draws itself; it stays as it is from run to run."""
    limits = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}
    return io.Int.Input("seed", **limits, control_after_generate=False, tooltip=tooltip, **more)


SAVE_MEMORY = {"auto": None, "on": True, "off": False}
"""What :func:`save_memory_input` offers, as ``recompute`` of the library."""


def save_memory_input() -> Any:
    """Whether a gradient keeps the whole graph in memory."""
    return io.Combo.Input(
        "save_memory",
        options=list(SAVE_MEMORY),
        default="auto",
        tooltip="on: parts of the model are computed twice, which takes a third longer but a fraction of the memory. "
        "auto: only when memory runs out.",
        **advanced(),
    )


def scheduler_input(tooltip: str) -> Any:
    """One of core's schedulers, by name."""
    names = list(comfy.samplers.SCHEDULER_NAMES)
    return io.Combo.Input("scheduler", options=names, default="ddim_uniform", tooltip=tooltip)


def sigmas_input() -> Any:
    """Noise levels in the place of steps and scheduler."""
    tooltip = "Your own noise levels, noisiest first; used instead of steps and scheduler."
    return io.Sigmas.Input("sigmas", optional=True, tooltip=tooltip)
