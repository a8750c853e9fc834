"""Blended Latent Diffusion: Blend Step keeps the source while a sampler works, Paste Background its exact pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from comfy_api.latest import io

from ..retrace.blending.blend import BlendSettings, Level, NoiseMode
from ..retrace.blending.paste import paste_background
from ..retrace.core.errors import InvalidInput
from ..retrace.masks import LatentMaskMode
from ._checks import require_trajectory
from ._errors import reports_errors
from ._schema import Trajectory, advanced, schema, seed_input

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Latent, Model


class BlendStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "blending",
            node_id="RetraceBlendStep",
            display_name="Blend Step",
            description="Patches a model so that any sampler edits only inside the mask: at every step, the rest is "
            "replaced by the source image at the matching noise level (Blended Latent Diffusion).",
            search_aliases=["blended diffusion", "blended latent diffusion", "inpaint", "keep background"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; the input model stays unchanged."),
                io.Mask.Input("mask", tooltip="Where the sampler may edit (1 = edit); values in between blend."),
                io.Latent.Input(
                    "source",
                    optional=True,
                    tooltip="The image to keep, from 'VAE Encode'. Not needed when a trajectory is connected.",
                ),
                Trajectory.Input(
                    "trajectory",
                    optional=True,
                    tooltip="The inversion of the image to keep, from 'DDIM Inverter'; used instead of 'source'.",
                ),
                io.Combo.Input(
                    "noise",
                    options=list(get_args(NoiseMode)),
                    default="fixed",
                    tooltip="The noise on the background. fixed: the same at all steps. fresh: new at every step, as "
                    "in the paper. trajectory: the stored steps of the inversion (sample with the inverter's SIGMAS).",
                ),
                io.Combo.Input(
                    "level",
                    options=list(get_args(Level)),
                    default="next",
                    tooltip="next: the background has the same noise level as the edit. current: one step noisier, as "
                    "in the authors' code.",
                    **advanced(),
                ),
                io.Combo.Input(
                    "cells",
                    options=list(get_args(LatentMaskMode)),
                    default="max",
                    tooltip="How the mask is converted to the latent grid, whose cells cover 8x8 pixels. max: a cell "
                    "that the mask touches may change, so thin lines work. area: only as far as it is covered, so "
                    "objects stay inside the mask.",
                ),
                io.Int.Input(
                    "shrink_stages",
                    default=0,
                    min=0,
                    max=16,
                    tooltip="For thin masks: start with this many wider masks, end with the exact one. 0: off.",
                ),
                seed_input("Seed of the background noise."),
            ],
            outputs=[
                io.Model.Output(
                    "blended_model", display_name="MODEL", tooltip="The patched model, for KSampler or SamplerCustom."
                )
            ],
        )

    @classmethod
    @reports_errors("Blend Step")
    def execute(
        cls,
        model: Model,
        mask: torch.Tensor,
        noise: NoiseMode,
        level: Level,
        cells: LatentMaskMode,
        shrink_stages: int,
        seed: int,
        source: Latent | None = None,
        trajectory: object = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.blend import patch_blend

        if source is None and trajectory is None:
            raise InvalidInput(
                "there is no image to keep. Connect the LATENT of 'VAE Encode' to 'source', or the trajectory of 'DDIM "
                "Inverter' to 'trajectory'."
            )
        settings = BlendSettings(noise=noise, level=level, cells=cells, stages=shrink_stages, seed=seed)
        kept = source if trajectory is None else require_trajectory(trajectory)
        return io.NodeOutput(patch_blend(model, kept, mask, settings))


class PasteBackground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "blending",
            node_id="RetracePasteBackground",
            display_name="Paste Background",
            description="Restores the source's own pixels wherever the mask is 0, bit for bit, and fades the edit in "
            "along the inner edge of the mask.",
            search_aliases=["composite", "restore background", "uncrop"],
            inputs=[
                io.Image.Input("edited", tooltip="The image after the edit."),
                io.Image.Input("source", tooltip="The image before the edit, of the same size."),
                io.Mask.Input("mask", tooltip="Where the edit stays (1 = edit)."),
                io.Float.Input(
                    "feather",
                    default=3.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip="Feather width in pixels, inside the mask only. 0: a hard edge.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The edit on the source; outside the mask, exactly the source.",
                )
            ],
        )

    @classmethod
    @reports_errors("Paste Background")
    def execute(cls, edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, feather: float) -> io.NodeOutput:
        return io.NodeOutput(paste_background(edited, source, mask, feather))
