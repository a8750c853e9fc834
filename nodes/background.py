"""Background Reconstruction: an edit and its surroundings without a seam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from comfy_api.latest import io, ui

from ..retrace.blending.decoder import Training, reconstruct_background
from ..retrace.blending.poisson import poisson_background
from ..retrace.core.errors import InvalidInput
from ._errors import reports_errors
from ._schema import advanced, schema

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Vae


class BackgroundReconstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "blending",
            node_id="RetraceBackgroundReconstruction",
            display_name="Background Reconstruction",
            description="Restores the source around an edit without a seam: either a private copy of the VAE's "
            "decoder learns the background of this one image (Blended Latent Diffusion), or Poisson blending shifts "
            "the colours of the edit.",
            search_aliases=["blended latent diffusion", "poisson", "seamless clone", "seam", "restore background"],
            inputs=[
                io.Image.Input("edited", tooltip="The image after the edit, as the VAE decoded it."),
                io.Image.Input("source", tooltip="The image before the edit, of the same size."),
                io.Mask.Input("mask", tooltip="Where the edit stays (1 = edit); decoder blends values in between."),
                io.Vae.Input("vae", optional=True, tooltip="Needed only by decoder. It stays unchanged."),
                io.Combo.Input(
                    "method",
                    options=["decoder", "poisson"],
                    default="decoder",
                    tooltip="decoder: trains a copy of the VAE's decoder on this image, half a minute or more on a "
                    "graphics card. poisson: takes seconds and is exact outside the mask, but the edit takes on the "
                    "colours around it.",
                ),
                io.Int.Input("steps", default=75, min=1, max=10000, tooltip="decoder: maximum training steps."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=0.1,
                    step=1e-5,
                    round=1e-7,
                    tooltip="decoder: the learning rate. Much more than 0.0001 spoils the image.",
                    **advanced(),
                ),
                io.Float.Input(
                    "weight",
                    default=100.0,
                    min=0.0,
                    max=1e6,
                    step=1.0,
                    tooltip="decoder: how much the background counts relative to the edit.",
                    **advanced(),
                ),
                io.Float.Input(
                    "stop",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="decoder: stop when the background PSNR reaches this many dB (45 is hard to tell from the "
                    "source). 0: stop only after ten steps in a row without improvement.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The edit in the source's surroundings."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="PSNR of the background before and after, and the number of steps.",
                ),
            ],
        )

    @classmethod
    @reports_errors("Background Reconstruction")
    def execute(
        cls,
        edited: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor,
        method: Literal["decoder", "poisson"],
        steps: int,
        learning_rate: float,
        weight: float,
        stop: float,
        vae: Vae = None,
    ) -> io.NodeOutput:
        if method == "poisson":
            blended = poisson_background(edited, source, mask)
            text = blended.text()
            return io.NodeOutput(blended.image, text, ui=ui.PreviewText(text))
        if vae is None:
            raise InvalidInput(
                "the method 'decoder' trains a copy of a VAE's decoder, but no VAE is connected. Connect the one that "
                "decoded the edit to 'vae', or choose 'poisson'."
            )
        from ..retrace.hosts.comfyui.autoencoder import ComfyAutoencoder, progress_with_preview

        training = Training(steps=steps, learning_rate=learning_rate, weight=weight, stop=stop)
        result = reconstruct_background(ComfyAutoencoder(vae), edited, source, mask, training, progress_with_preview())
        text = result.text()
        return io.NodeOutput(result.image, text, ui=ui.PreviewText(text))
