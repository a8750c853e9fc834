"""Rank by CLIP: the candidates of a batch, the best first."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy_api.latest import io, ui

from ..retrace.clip_guidance.ranking import Region, rank_by_clip, rank_by_reference
from ..retrace.models.clip.model import ImageTextModel
from ..retrace.pictures.labels import with_labels
from ._errors import reports_errors
from ._schema import ImageText, advanced, schema


class RankByCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "report",
            node_id="RetraceRankByCLIP",
            display_name="Rank by CLIP",
            description="Sorts the images of a batch by how well they, or their masked parts, match the prompt. Make "
            "several candidates of an edit and keep the best.",
            search_aliases=["blended diffusion", "best of", "clip score", "rerank", "sort images", "pick best"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The candidates, as one batch."),
                ImageText.Input("clip", tooltip="From 'Load CLIP (Retrace)'."),
                io.String.Input("prompt", multiline=True, tooltip="What the region should show."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The region that the prompt is about (every pixel above 0): one for all images, or one "
                    "for each. Without it, the whole image counts.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(get_args(Region)),
                    default="masked",
                    tooltip="What the CLIP sees. masked: black outside the mask, as in the paper. box: the box around "
                    "the mask, cropped and enlarged. whole: the image as it is, whatever the mask.",
                ),
                io.Int.Input(
                    "keep", default=0, min=0, max=4096, tooltip="Output at most this many of the best. 0: all."
                ),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: the score of the authors' code of Blended Diffusion, a distance without the CLIP's "
                    "colour normalisation; lower is better.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Image.Output("sorted_images", display_name="images", tooltip="The images, best first."),
                io.Int.Output(
                    "best_index",
                    display_name="best_index",
                    tooltip="Position of the best image in the batch, counted from 0; for example for 'Latent From "
                    "Batch'.",
                ),
                io.String.Output(
                    "scores", display_name="scores", tooltip="Rank, position in the batch and score of every image."
                ),
            ],
        )

    @classmethod
    @reports_errors("Rank by CLIP")
    def execute(
        cls,
        images: torch.Tensor,
        clip: ImageTextModel,
        prompt: str,
        region: Region,
        keep: int,
        parity: bool,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.image_text import on_compute_device

        rank = rank_by_reference if parity else rank_by_clip
        with on_compute_device(clip):
            ranking = rank(images, prompt, clip, mask, region)
        count = keep or len(images)
        chosen = images[list(ranking.order[:count])]
        text = ranking.text()
        shown: dict[str, Any] = ui.PreviewImage(with_labels(chosen, ranking.labels()[:count]), cls=cls).as_dict()
        return io.NodeOutput(chosen, ranking.order[0], text, ui={**shown, **ui.PreviewText(text).as_dict()})
