"""Edit-friendly DDPM inversion: Edit-friendly Inverter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..retrace.core.checks import check_latent
from ..retrace.inversion.edit_friendly import EditFriendlySettings, without_first_steps
from ._checks import latent_samples
from ._errors import reports_errors
from ._memory import PeakMemory
from ._schema import Trajectory, advanced, scheduler_input, schema, seed_input, sigmas_input

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import ConditioningList, Latent, Model


class EditFriendlyInverter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceEditFriendlyInverter",
            display_name="Edit-friendly Inverter",
            description="Finds the noise for every step with which a sampler reproduces this image exactly, even at "
            "high cfg; another prompt with the same noise edits it (edit-friendly DDPM inversion). Continue with "
            "SamplerCustom, add_noise off, and this node's LATENT, SIGMAS and SAMPLER.",
            search_aliases=["ddpm inversion", "edit friendly ddpm", "ledits", "invert image"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the image as it is."),
                io.Conditioning.Input("negative", tooltip="Usually an empty prompt; sample with the same one."),
                io.Latent.Input("latent", tooltip="The image, from 'VAE Encode'. Batches work."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the full schedule, before 'skip' removes some.",
                ),
                scheduler_input("Sets the noise levels; SIGMAS holds the ones you will sample with."),
                io.Float.Input(
                    "source_cfg",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The cfg at which the positive prompt above reproduces the image. Use a higher cfg for "
                    "the edit.",
                ),
                io.Float.Input(
                    "skip",
                    default=0.36,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="The share of the steps to leave out, starting with the noisiest. More keeps more of the "
                    "image; less lets the edit change more.",
                ),
                seed_input("Every seed reproduces the same image, but gives a different edit of it."),
                io.Int.Input(
                    "batch",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="How many steps are predicted at once: more is faster and uses more memory. If the model "
                    "or the conditioning has patches, time ranges, hooks or ControlNets, steps run one at a time.",
                    **advanced(),
                ),
                sigmas_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip="The noisy image to start from; sample without adding noise.",
                ),
                Trajectory.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The image at every noise level, each with independent noise.",
                ),
                io.Sigmas.Output("left_sigmas", display_name="SIGMAS", tooltip="The noise levels left after 'skip'."),
                io.Sampler.Output(
                    "sampler",
                    display_name="SAMPLER",
                    tooltip="Adds the noise that was found; works with these SIGMAS only.",
                ),
                io.String.Output("report", display_name="report", tooltip="What it cost, and how strong the noise is."),
            ],
        )

    @classmethod
    @reports_errors("Edit-friendly Inverter")
    def execute(
        cls,
        model: Model,
        positive: ConditioningList,
        negative: ConditioningList,
        latent: Latent,
        steps: int,
        scheduler: str,
        source_cfg: float,
        skip: float,
        seed: int,
        batch: int,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.latents import noise_samples
        from ..retrace.hosts.comfyui.runs.edit_friendly import noise_sampler, prepare_edit_friendly

        host = ComfyHost(model)
        samples = check_latent("latent", latent_samples(latent), host.latent_channels)
        levels = without_first_steps(host.sigmas(scheduler, steps) if sigmas is None else sigmas, skip)
        memory = PeakMemory()
        settings = EditFriendlySettings(source_cfg, seed, batch)
        found = prepare_edit_friendly(host, samples, levels, positive, negative, settings)
        report = found.text(memory.megabytes())
        return io.NodeOutput(
            {"samples": noise_samples(host, found.trajectory)},
            found.trajectory,
            found.trajectory.sigmas.clone(),  # core's uni_pc writes into the sigmas that it is given
            noise_sampler(found),
            report,
            ui=ui.PreviewText(report),
        )
