"""The nodes: schema, checks, one call into the library. No mathematics lives here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention_mask import AttentionMask
from .background import BackgroundReconstruction
from .blending import BlendStep, PasteBackground
from .clip import LoadCLIP
from .clip_guidance import CLIPGuidance
from .drag import DragLatentOptimizer
from .drag_points import DragPointsNode
from .edit_friendly import EditFriendlyInverter
from .identity_lora import IdentityLora
from .inversion import DDIMInverter
from .inversion_files import LoadInversion, SaveInversion
from .masks import MaskPrecisionBlur
from .null_text import NullTextOptimizer
from .pebble import LoadPebble, PebbleScene
from .prompt_to_prompt import DirectInversion, PromptToPromptNode, ProximalGuidance
from .ranking import RankByCLIP
from .reference_kv import ReferenceKVControl
from .report import EditReportNode
from .schedule import ReferenceSchedule
from .warp import WarpAndInpaint

NODES: list[type[io.ComfyNode]] = [
    LoadPebble,
    PebbleScene,
    DDIMInverter,
    EditFriendlyInverter,
    SaveInversion,
    LoadInversion,
    NullTextOptimizer,
    PromptToPromptNode,
    DirectInversion,
    ProximalGuidance,
    AttentionMask,
    ReferenceSchedule,
    BlendStep,
    CLIPGuidance,
    PasteBackground,
    BackgroundReconstruction,
    MaskPrecisionBlur,
    EditReportNode,
    RankByCLIP,
    LoadCLIP,
    DragPointsNode,
    IdentityLora,
    DragLatentOptimizer,
    ReferenceKVControl,
    WarpAndInpaint,
]


class RetraceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
