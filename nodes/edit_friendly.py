"""Edit-friendly DDPM inversion: Edit-friendly Inverter."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..retrace.core.checks import check_latent
from ..retrace.core.schedule import check_sigmas
from ..retrace.inversion.edit_friendly import without_first_steps
from ._checks import latent_samples
from ._errors import reports_errors
from ._memory import PeakMemory
from ._schema import Trajectory, advanced, scheduler_input, schema, seed_input, sigmas_input


class EditFriendlyInverter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceEditFriendlyInverter",
            display_name="Edit-friendly Inverter",
            description="Finds the noise of every step with which a sampler makes exactly this picture, even at high "
            "cfg; other words with the same noises edit it (edit-friendly DDPM inversion). Continue with "
            "SamplerCustom, add_noise off, and the LATENT, SIGMAS and SAMPLER of this node.",
            search_aliases=["ddpm inversion", "edit friendly ddpm", "ledits", "invert image"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Conditioning.Input("positive", tooltip="The words that describe the picture as it is."),
                io.Conditioning.Input("negative", tooltip="An empty prompt, as a rule; sample with the same one."),
                io.Latent.Input("latent", tooltip="The picture, from 'VAE Encode'. Batches work."),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, tooltip="Steps of the whole schedule, before skip takes some."
                ),
                scheduler_input("The noise levels; SIGMAS holds those that you will sample with."),
                io.Float.Input(
                    "source_cfg",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The guidance at which the positive above brings the picture back. Edit with a higher cfg.",
                ),
                io.Float.Input(
                    "skip",
                    default=0.36,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="The share of the steps, from the noisiest on, that is left out. More keeps more of the "
                    "picture, less lets the edit change more.",
                ),
                seed_input("Every seed returns the same picture, and gives another edit of it."),
                io.Int.Input(
                    "batch",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="How many steps are predicted at once: more is faster and takes more memory. Models or "
                    "conditions with patches, time ranges, hooks or ControlNets go one by one.",
                    **advanced(),
                ),
                sigmas_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip="The noisy picture to start from, with no noise added.",
                ),
                Trajectory.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The picture at every noise level, each with own noise.",
                ),
                io.Sigmas.Output("left_sigmas", display_name="SIGMAS", tooltip="The noise levels that skip leaves."),
                io.Sampler.Output(
                    "sampler", display_name="SAMPLER", tooltip="Adds the noises that were found; for these SIGMAS only."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What it cost, and how strong the noises are."
                ),
            ],
        )

    @classmethod
    @reports_errors("Edit-friendly Inverter")
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        steps: int,
        scheduler: str,
        source_cfg: float,
        skip: float,
        seed: int,
        batch: int,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.runs.edit_friendly import prepare_edit_friendly

        host = ComfyHost(model)
        samples = check_latent("latent", latent_samples(latent), host.latent_channels)
        levels = host.sigmas(scheduler, steps) if sigmas is None else check_sigmas(sigmas)
        memory = PeakMemory()
        prepared = prepare_edit_friendly(
            host,
            samples,
            without_first_steps(levels, skip),
            positive,
            negative,
            source_cfg,
            seed=seed,
            batch=batch,
        )
        report = prepared.report(memory.megabytes())
        return io.NodeOutput(
            {"samples": prepared.latent},
            prepared.found.trajectory,
            prepared.found.trajectory.sigmas.clone(),  # core's uni_pc writes into the sigmas that it is given
            prepared.sampler(),
            report,
            ui=ui.PreviewText(report),
        )
