"""DDIM inversion: DDIM Inverter, Save Inversion, Load Inversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..retrace.core.checks import check_latent
from ..retrace.core.schedule import check_sigmas
from ..retrace.inversion.invert import METHODS, InversionSettings, Method
from ._checks import latent_samples
from ._errors import reports_errors
from ._memory import PeakMemory
from ._schema import Trajectory, advanced, scheduler_input, schema, sigmas_input

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import ConditioningList, Latent, Model, Vae


class DDIMInverter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceDDIMInverter",
            display_name="DDIM Inverter",
            description="Finds the noise from which a deterministic sampler (euler or ddim, cfg 1) reproduces this "
            "image exactly, and keeps the path to it. Continue with KSampler (Advanced) with add_noise disabled, or "
            "with SamplerCustom and this node's SIGMAS.",
            search_aliases=["ddim inversion", "unsampler", "invert image", "aidi", "renoise", "spdinv"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with; sample with the same one."),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the image as it is."),
                io.Latent.Input("latent", tooltip="The image, from 'VAE Encode'. Batches work."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Number of inversion steps; sample with the same number.",
                ),
                scheduler_input("Sets the noise levels of the inversion; sample with the same scheduler."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="fixed_point",
                    tooltip="ddim: one evaluation per step, drifts a little. fixed_point: several evaluations, nearly "
                    "exact. spdinv: solves each step with gradients (SPDInv), slowest.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-7,
                    tooltip="When a step counts as solved. 0: the method's default. Not used by ddim.",
                    **advanced(),
                ),
                io.Int.Input(
                    "max_iterations",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Maximum evaluations per step. 0: the method's default. Not used by ddim.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    tooltip="Sample back once and report how closely the image is reproduced (costs one evaluation "
                    "per step).",
                ),
                sigmas_input(),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Connect it to have the report compare images as well as latents."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.samplers.SAMPLER_NAMES),
                    default="euler",
                    optional=True,
                    tooltip="The sampler you will sample with, for the SAMPLER output. euler and ddim retrace the "
                    "inversion step by step; samplers that add noise are refused.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "noise_latent", display_name="LATENT", tooltip="The noise, for a sampler that adds none of its own."
                ),
                Trajectory.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The latents at every noise level of the inversion.",
                ),
                io.Sigmas.Output("walked_sigmas", display_name="SIGMAS", tooltip="The noise levels of the inversion."),
                io.String.Output(
                    "report", display_name="report", tooltip="How accurate the result is, and how long it took."
                ),
                io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="The chosen sampler, for SamplerCustom."),
            ],
        )

    @classmethod
    @reports_errors("DDIM Inverter")
    def execute(
        cls,
        model: Model,
        positive: ConditioningList,
        latent: Latent,
        steps: int,
        scheduler: str,
        method: Method,
        tolerance: float,
        max_iterations: int,
        verify: bool,
        sigmas: torch.Tensor | None = None,
        vae: Vae = None,
        sampler_name: str = "euler",
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.latents import noise_samples
        from ..retrace.hosts.comfyui.runs.inversion import invert_latent
        from ..retrace.hosts.comfyui.sampling import require_deterministic

        require_deterministic(sampler_name)
        host = ComfyHost(model, vae=vae)
        samples = check_latent("latent", latent_samples(latent), host.latent_channels)
        levels = host.sigmas(scheduler, steps) if sigmas is None else check_sigmas(sigmas)
        memory = PeakMemory()
        settings = InversionSettings(method, tolerance or None, max_iterations or None)
        inverted = invert_latent(host, samples, levels, positive, settings, verify)
        report = inverted.text(memory.megabytes())
        return io.NodeOutput(
            {"samples": noise_samples(host, inverted.trajectory)},
            inverted.trajectory,
            inverted.trajectory.sigmas.clone(),  # core's uni_pc writes into the sigmas that it is given
            report,
            comfy.samplers.sampler_object(sampler_name),
            ui=ui.PreviewText(report),
        )
