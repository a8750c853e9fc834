"""Attention Mask: the region of a word, from the model's own attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..retrace.core.prompt import parse_words
from ._checks import require_trajectory
from ._errors import reports_errors
from ._schema import Trajectory, schema

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Clip, Model


class AttentionMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "prompts",
            node_id="RetraceAttentionMask",
            display_name="Attention Mask",
            description="Makes a mask of what a word of the prompt shows in a photo, from the model's cross-attention "
            "along the inversion. For 'Blend Step' or any inpainting workflow, or to look at the maps themselves.",
            search_aliases=["word mask", "cross attention map", "daam", "text mask", "segment"],
            inputs=[
                io.Model.Input("model", tooltip="The model that inverted the image."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                Trajectory.Input("trajectory", tooltip="The inversion of the image. Batches work."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="A prompt that describes the image as it is.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The words of the prompt to find, separated by commas. Empty: all of them.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Where the mask is cut off, relative to the strongest attention. 0: a soft mask.",
                ),
                io.Int.Input(
                    "levels",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="How many steps of the inversion to look at; one evaluation each.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="MASK", tooltip="All of these words together; 1 = attended."),
                io.Image.Output(
                    "maps", display_name="maps", tooltip="One map for each word, in the order of the report."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The words, and how much of the image each one covers."
                ),
            ],
        )

    @classmethod
    @reports_errors("Attention Mask")
    def execute(
        cls, model: Model, clip: Clip, trajectory: object, prompt: str, words: str, threshold: float, levels: int
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.prompt_to_prompt.word_masks import find_words

        path = require_trajectory(trajectory)
        found = find_words(ComfyHost(model, clip), path, prompt, parse_words(words), threshold, levels)
        report = found.text()
        return io.NodeOutput(found.mask, found.images, report, ui=ui.PreviewText(report))
