"""Warp and Inpaint: points move the masked region geometrically, and a mask says what is left to paint."""

from __future__ import annotations

from typing import get_args

import torch
from comfy_api.latest import io, ui

from ..retrace.drag.warp.apply import WarpSettings, warp_by_points
from ..retrace.drag.warp.deformation import Mode
from ._checks import require_points
from ._errors import reports_errors
from ._schema import Points, schema


class WarpAndInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "drag",
            node_id="RetraceWarpAndInpaint",
            display_name="Warp and Inpaint",
            description="Moves, turns or bends the masked part of an image so that every point lands on its target, "
            "and outputs the mask of what any inpainting workflow then has to paint. No model, a fraction of a second "
            "(Inpaint4Drag).",
            search_aliases=["inpaint4drag", "drag", "liquify", "move object", "puppet warp", "mls", "deform"],
            has_intermediate_output=True,
            inputs=[
                Points.Input("points", tooltip="Points and their targets, from 'Drag Points'."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What moves (1 = moves): paint over the object with a few pixels around it. Separate "
                    "parts move independently, each with the points on it. Without a mask, the whole image is "
                    "deformed.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(get_args(Mode)),
                    default="rigid",
                    tooltip="What several points do. rigid: move and turn, keeping the shape as far as they allow. "
                    "scale: also enlarge and shrink. stretch: pull it like rubber. A single point only moves, in "
                    "every mode.",
                ),
                io.Int.Input(
                    "grow",
                    default=5,
                    min=0,
                    max=512,
                    tooltip="Grows the hole by this many pixels, to cover the soft outline and the shadow that the "
                    "object leaves behind. 5 suits 512 pixels, 10 suits 1024.",
                ),
                io.Int.Input(
                    "border",
                    default=2,
                    min=0,
                    max=512,
                    tooltip="Repaints this many pixels on both sides of the object's new outline, so that it blends "
                    "in. Where the outline did not move, it is kept.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip="The mask fades out over this many pixels beyond that. 0: a hard edge.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The image with the object moved; the hole is filled smoothly from its surroundings.",
                ),
                io.Mask.Output(
                    "inpaint_mask",
                    display_name="inpaint mask",
                    tooltip="What has to be painted (1 = paint): where the object was, and along its new outline.",
                ),
                io.Mask.Output(
                    "moved_mask",
                    display_name="moved mask",
                    tooltip="The mask at its new position: where the object is now.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What moved, and how much has to be painted."
                ),
            ],
        )

    @classmethod
    @reports_errors("Warp and Inpaint")
    def execute(
        cls,
        points: object,
        mode: Mode,
        grow: int,
        border: int,
        feather: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        settings = WarpSettings(mode=mode, grow=grow, border=border, feather=feather)
        result = warp_by_points(require_points(points), mask, settings)
        report = result.text()
        preview = ui.PreviewImage(result.image, cls=cls)
        return io.NodeOutput(
            result.image,
            result.inpaint,
            result.moved,
            report,
            ui={**preview.as_dict(), **ui.PreviewText(report).as_dict()},
        )
