"""CLIP Guidance: words steer any sampler through an image-text model."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from comfy_api.latest import io

from ..retrace.clip_guidance import Augmentations, ClipGuidance, GradientPath, Look, Schedule, View, Weights
from ..retrace.metrics import load_lpips
from ..retrace.models.clip.model import ImageTextModel
from ._errors import reports_errors
from ._schema import ImageText, advanced, schema, seed_input

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Model, Vae


class CLIPGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "blending",
            node_id="RetraceCLIPGuidance",
            display_name="CLIP Guidance",
            description="Patches a model so that any sampler moves towards what a CLIP recognises as the prompt "
            "(Blended Diffusion). With 'Blend Step' it edits only inside a mask; without it, this is local "
            "CLIP-guided diffusion.",
            search_aliases=["clip guided diffusion", "blended diffusion", "mpgd", "universal guidance", "freedom"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; the input model stays unchanged."),
                ImageText.Input("clip", tooltip="From 'Load CLIP (Retrace)': the model that looks at the image."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the region, or the whole image, should show. The sampler's own prompt may be "
                    "different, or empty.",
                ),
                io.Float.Input(
                    "strength",
                    default=1000.0,
                    min=0.0,
                    max=1e6,
                    step=100.0,
                    round=0.01,
                    tooltip="How hard the prompt pulls: 1000 in the authors' code. Small CLIPs may need several times "
                    "as much, large real-world models less.",
                ),
                io.Combo.Input(
                    "gradient",
                    options=list(get_args(GradientPath)),
                    default="x0",
                    tooltip="x0: the gradient stops at the clean estimate; a guided step goes through the VAE and the "
                    "CLIP and back, but not back through the model. full: back through the model as well, as in the "
                    "paper; slower, and with the memory use of training.",
                ),
                io.Combo.Input(
                    "view",
                    options=list(get_args(View)),
                    default="region",
                    tooltip="What the CLIP sees. region: the masked part on grey, as in the paper. picture: the whole "
                    "image.",
                ),
                io.Int.Input(
                    "augmentations",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="Random views of the image for the CLIP at every guided step; 1 is the plain image alone. "
                    "More give a more accurate gradient. Each costs one pass of the CLIP.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the steps guidance starts.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Where in the steps guidance ends."
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Guide only every n-th step: 2 halves the extra cost. Raise the strength along with it.",
                ),
                seed_input("Seed of the random views."),
                io.Mask.Input("mask", optional=True, tooltip="The region that the prompt is about (1 = edit)."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the image that the CLIP sees. A TAESD from 'Load VAE' costs a tenth of a full "
                    "VAE. Without any, the CLIP sees only colours, one pixel per latent cell.",
                ),
                io.Image.Input(
                    "source", optional=True, tooltip="The image before the edit, for the background losses below."
                ),
                io.Float.Input(
                    "range",
                    default=50.0,
                    min=0.0,
                    max=1e6,
                    step=10.0,
                    tooltip="Weight of the loss that keeps colours in range.",
                    **advanced(),
                ),
                io.Float.Input(
                    "background_mse",
                    default=0.0,
                    min=0.0,
                    max=1e7,
                    step=100.0,
                    tooltip="Weight of the difference from the source outside the mask (10000 in the authors' code). "
                    "Not needed with 'Blend Step'.",
                    **advanced(),
                ),
                io.Float.Input(
                    "background_lpips",
                    default=0.0,
                    min=0.0,
                    max=1e7,
                    step=100.0,
                    tooltip="The same, measured with LPIPS (1000 in the authors' code). Needs the package 'lpips' and "
                    "the VGG-16 weights in torch's cache.",
                    **advanced(),
                ),
                io.Float.Input(
                    "dsg",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Above 0, only the direction of the gradient counts, and the latent moves by this share "
                    "of a step's noise, whatever the weights (DSG). Try 0.1.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: follow the authors' code where it differs from the paper: mask before views, source "
                    "unmasked, noisy and clean image mixed.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "guided_model", display_name="MODEL", tooltip="The patched model, for KSampler or SamplerCustom."
                )
            ],
        )

    @classmethod
    @reports_errors("CLIP Guidance")
    def execute(
        cls,
        model: Model,
        clip: ImageTextModel,
        prompt: str,
        strength: float,
        gradient: GradientPath,
        view: View,
        augmentations: int,
        start_percent: float,
        end_percent: float,
        every: int,
        seed: int,
        mask: torch.Tensor | None = None,
        vae: Vae = None,
        source: torch.Tensor | None = None,
        range: float = 50.0,
        background_mse: float = 0.0,
        background_lpips: float = 0.0,
        dsg: float = 0.0,
        parity: bool = False,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.clip_guidance import patch_clip_guidance

        lpips = None
        if background_lpips:
            with torch.inference_mode(False):  # gradients go through it
                lpips = load_lpips("vgg")
        weights = Weights(clip=strength, range=range, background_lpips=background_lpips, background_mse=background_mse)
        guidance = ClipGuidance(
            clip,
            prompt,
            mask,
            source,
            lpips,
            weights=weights,
            augmentations=Augmentations(count=augmentations),
            view=view,
            look=Look.reference() if parity else Look(),
        )
        schedule = Schedule(path=gradient, every=every, dsg=dsg, move="variance" if parity else "score")
        return io.NodeOutput(
            patch_clip_guidance(
                model,
                guidance,
                schedule,
                vae=vae,
                start_percent=start_percent,
                end_percent=end_percent,
                seed=seed,
            )
        )
