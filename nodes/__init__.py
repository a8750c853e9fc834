"""The nodes: schema, checks, one call into the library. No mathematics lives here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .blending import BlendStep, PasteBackground
from .inversion import DDIMInverter
from .inversion_files import LoadInversion, SaveInversion
from .masks import MaskPrecisionBlur
from .null_text import NullTextOptimizer
from .pebble import LoadPebble, PebbleScene
from .report import EditReportNode
from .schedule import ReferenceSchedule

NODES: list[type[io.ComfyNode]] = [
    LoadPebble,
    PebbleScene,
    DDIMInverter,
    SaveInversion,
    LoadInversion,
    NullTextOptimizer,
    ReferenceSchedule,
    BlendStep,
    PasteBackground,
    MaskPrecisionBlur,
    EditReportNode,
]


class RetraceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
