"""Masks: SmartBrush's precision levels."""

from __future__ import annotations

from typing import Literal

import torch
from comfy_api.latest import io

from ..retrace.core.errors import InvalidSetting
from ..retrace.masks import mask_precision
from ._errors import reports_errors
from ._schema import schema


class MaskPrecisionBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "masks",
            node_id="RetraceMaskPrecisionBlur",
            display_name="Mask Precision Blur",
            description="Coarsens a mask from its exact outline (level 0) to the bounding box of each object in it "
            "(the highest level), as in SmartBrush: a coarse mask leaves an edit free to choose its own outline.",
            search_aliases=["smartbrush", "grow mask", "mask to bounding box", "expand mask"],
            inputs=[
                io.Mask.Input("mask", tooltip="The mask to coarsen. Separate objects in it grow independently."),
                io.Int.Input(
                    "level",
                    default=2,
                    min=0,
                    max=100,
                    tooltip="0 is the exact mask, 'levels' the bounding box; each level contains the one before.",
                ),
                io.Int.Input(
                    "levels",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="Number of levels from the exact mask to its bounding box.",
                ),
                io.Combo.Input(
                    "edges",
                    options=["binary", "soft"],
                    default="binary",
                    tooltip="binary: 0 or 1. soft: the mask fades out where it was grown.",
                ),
            ],
            outputs=[io.Mask.Output("coarse_mask", display_name="mask", tooltip="The mask at that precision level.")],
        )

    @classmethod
    @reports_errors("Mask Precision Blur")
    def execute(cls, mask: torch.Tensor, level: int, levels: int, edges: Literal["binary", "soft"]) -> io.NodeOutput:
        if level > levels:
            raise InvalidSetting(
                f"level is {level}, but there are only levels 0 to {levels}. Lower 'level' or raise 'levels'."
            )
        return io.NodeOutput(mask_precision(mask, level, levels, soft=edges == "soft"))
