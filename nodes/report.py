"""Edit Report: numbers for an edit."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..retrace.metrics import edit_report, load_lpips
from ..retrace.models.clip.model import ImageTextModel
from ._errors import reports_errors
from ._schema import ImageText, schema

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import ClipVision


class EditReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "report",
            node_id="RetraceEditReport",
            display_name="Edit Report",
            description="Compares an edit with its source: PSNR, SSIM and (optionally) LPIPS, inside and outside the "
            "mask, and whether the background is still identical in 8 bits.",
            search_aliases=["psnr", "ssim", "lpips", "compare images", "metrics", "clip score", "structure distance"],
            is_output_node=True,
            inputs=[
                io.Image.Input("edited", tooltip="The image after the edit."),
                io.Image.Input("source", tooltip="The image before the edit, of the same size."),
                io.Mask.Input("mask", tooltip="Where the edit was allowed (1 = edit)."),
                io.Boolean.Input(
                    "lpips",
                    default=False,
                    tooltip="Also measure LPIPS. Needs the package 'lpips' and the AlexNet weights in torch's cache.",
                ),
                ImageText.Input(
                    "clip",
                    optional=True,
                    tooltip="From 'Load CLIP (Retrace)': also measure how well the edit matches the prompt, and "
                    "whether its layout is still that of the source.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    tooltip="What the edit should show, for the CLIP score. Empty: no CLIP score.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Measures the layout (structure distance) instead of the CLIP; DINOv2 does this best.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="The report as a table."),
                io.String.Output("json", display_name="json", tooltip="The report as JSON, for programs."),
            ],
        )

    @classmethod
    @reports_errors("Edit Report")
    def execute(
        cls,
        edited: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor,
        lpips: bool,
        clip: ImageTextModel | None = None,
        prompt: str = "",
        clip_vision: ClipVision | None = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.image_text import on_compute_device, vision_tokens

        tokens = clip.visual_tokens if clip is not None and clip.has_tokens else None
        if clip_vision is not None:
            tokens = functools.partial(vision_tokens, clip_vision)
        with contextlib.nullcontext() if clip is None else on_compute_device(clip):
            perceptual = load_lpips() if lpips else None
            report = edit_report(edited, source, mask, lpips=perceptual, clip=clip, prompt=prompt, tokens=tokens)
        text = report.text()
        return io.NodeOutput(text, report.json(), ui=ui.PreviewText(text))
