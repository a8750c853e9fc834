"""Edit Report: numbers for an edit."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..retrace.metrics import edit_report
from ._errors import reports_errors
from ._schema import schema


class EditReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "report",
            node_id="RetraceEditReport",
            display_name="Edit Report",
            description="Compares an edit with its source: PSNR, SSIM and (on request) LPIPS, inside and outside the "
            "mask, and whether the background is still identical in 8 bits.",
            search_aliases=["psnr", "ssim", "lpips", "compare images", "metrics"],
            is_output_node=True,
            inputs=[
                io.Image.Input("edited", tooltip="The picture after the edit."),
                io.Image.Input("source", tooltip="The picture before the edit, of the same size."),
                io.Mask.Input("mask", tooltip="Where the edit was allowed (1 = edit)."),
                io.Boolean.Input(
                    "lpips",
                    default=False,
                    tooltip="Also measure LPIPS. Needs the package 'lpips' and the AlexNet weights in torch's cache.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="The report as a table."),
                io.String.Output("json", display_name="json", tooltip="The report as JSON, for programs."),
            ],
        )

    @classmethod
    @reports_errors("Edit Report")
    def execute(cls, edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, lpips: bool) -> io.NodeOutput:
        report = edit_report(edited, source, mask, lpips=lpips)
        text = report.text()
        return io.NodeOutput(text, report.json(), ui=ui.PreviewText(text))
