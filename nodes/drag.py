"""Dragging by points: Drag Latent Optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..retrace.core.errors import InvalidInput
from ..retrace.drag.latent.settings import DragSettings
from ._checks import latent_samples, require_points, require_trajectory
from ._errors import reports_errors
from ._memory import PeakMemory
from ._progress import progress_text
from ._schema import SAVE_MEMORY, Points, Trajectory, advanced, save_memory_input, scheduler_input, schema, sigmas_input

if TYPE_CHECKING:
    from ..retrace.drag.latent.settings import Mode
    from ..retrace.drag.latent.task import Callback
    from ..retrace.hosts.comfyui.types import ConditioningList, Latent, Model
    from ..retrace.inversion.invert import Method

BLOCKS = ("auto", "mid.0", "up.0", "up.1", "up.2", "up.3")


class DragLatentOptimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "drag",
            node_id="RetraceDragLatentOptimizer",
            display_name="Drag Latent Optimizer",
            description="Moves what lies at the handle points to their targets (DragDiffusion, GoodDrag): inverts the "
            "image part of the way to noise and optimises that latent until the points have arrived. Outputs a batch "
            "[reference, edited]; finish sampling it with 'Reference KV Control', SamplerCustom (no added noise), cfg "
            "1 and this node's SIGMAS.",
            search_aliases=["dragdiffusion", "gooddrag", "draggan", "point dragging", "move object"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD 1.x, SD 2.x or SDXL, ideally with an 'Identity LoRA' of the image."
                ),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the image as it is."),
                Points.Input("points", tooltip="From 'Drag Points'."),
                io.Int.Input(
                    "steps", default=50, min=2, max=1000, tooltip="Steps of the full schedule, all the way to noise."
                ),
                scheduler_input("Sets the noise levels of that schedule."),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far towards noise the image goes before it is dragged. Less keeps more and moves "
                    "less.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["gooddrag", "dragdiffusion"],
                    default="gooddrag",
                    tooltip="gooddrag: alternates dragging and denoising, and always compares with the original "
                    "image; reaches the targets more often. dragdiffusion: all iterations at one noise level, as in "
                    "the paper.",
                ),
                io.Combo.Input(
                    "mask_mode",
                    options=["soft", "hard"],
                    default="soft",
                    tooltip="soft: changes outside the mask are penalised, as in the papers. hard: the latent outside "
                    "stays exactly as it is; faster, because the last part of the network does not run.",
                ),
                io.Int.Input(
                    "changes",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Maximum iterations; it stops when all points have arrived. 0: as the authors do "
                    "(dragdiffusion 80; gooddrag 30 at each of the first levels: 180 with 50 steps and strength 0.7).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=1e-5,
                    tooltip="The learning rate. 0: as the authors do (0.01, gooddrag 0.02).",
                ),
                io.Float.Input(
                    "mask_weight",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.05,
                    round=1e-4,
                    tooltip="The penalty on changes outside a soft mask. -1: as the authors do (0.1, gooddrag 0.2).",
                    **advanced(),
                ),
                io.Float.Input(
                    "stop_radius",
                    default=2.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    tooltip="How close to its target a point has to come, in cells of 2 pixels.",
                    **advanced(),
                ),
                io.Int.Input(
                    "patch_radius",
                    default=-1,
                    min=-1,
                    max=32,
                    tooltip="Radius of the patch around a point that moves with it, in cells of 2 pixels. -1: as the "
                    "authors do (1, gooddrag 4).",
                    **advanced(),
                ),
                io.Int.Input(
                    "search_radius",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip="How far around its last position a point is searched for, in cells of 2 pixels. -1: as "
                    "the authors do (3, gooddrag 12).",
                    **advanced(),
                ),
                io.Combo.Input(
                    "feature_block",
                    options=list(BLOCKS),
                    default="auto",
                    tooltip="The block whose features tell what lies where. auto: the last but one (up.2 of SD 1.5).",
                    **advanced(),
                ),
                io.Combo.Input(
                    "inversion",
                    options=["fixed_point", "ddim"],
                    default="fixed_point",
                    tooltip="fixed_point reproduces the image nearly exactly; ddim takes a third of the time.",
                    **advanced(),
                ),
                io.Combo.Input(
                    "latent_is",
                    options=["picture", "noisy"],
                    default="picture",
                    tooltip="picture: from 'VAE Encode', to be inverted. noisy: a partly generated image from "
                    "'KSampler (Advanced)' with leftover noise, stopped where strength begins.",
                    **advanced(),
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="1 for photographs. For a generated image, the cfg it was generated with; needs a "
                    "negative.",
                    **advanced(),
                ),
                save_memory_input(),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: noise levels, inversion and mask exactly as in the authors' code.",
                    **advanced(),
                ),
                io.Latent.Input("latent", optional=True, tooltip="The image, from 'VAE Encode'."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the image may change (1 = may change). Without one: the noise mask of the latent, "
                    "if it has one; otherwise everywhere.",
                ),
                Trajectory.Input(
                    "trajectory",
                    optional=True,
                    tooltip="The inversion of the image, from 'DDIM Inverter'; used instead of latent, steps, "
                    "scheduler and sigmas, and not computed again when a point moves.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Only for cfg above 1."),
                sigmas_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent_batch",
                    display_name="LATENT",
                    tooltip="The batch [reference, edited], noisy, for a sampler that adds no noise.",
                ),
                io.Sigmas.Output("sigmas_left", display_name="SIGMAS", tooltip="The noise levels left to sample."),
                io.String.Output(
                    "report", display_name="report", tooltip="How far the points moved, and what it cost."
                ),
                io.String.Output("path", display_name="path", tooltip="Where every point went, as JSON."),
                io.Image.Output("path_image", display_name="path image", tooltip="The same, drawn on the image."),
            ],
        )

    @classmethod
    @reports_errors("Drag Latent Optimizer")
    def execute(
        cls,
        model: Model,
        positive: ConditioningList,
        points: object,
        steps: int,
        scheduler: str,
        strength: float,
        mode: Mode,
        mask_mode: str,
        changes: int,
        learning_rate: float,
        mask_weight: float,
        stop_radius: float,
        patch_radius: int,
        search_radius: int,
        feature_block: str,
        inversion: Method,
        latent_is: str,
        cfg: float,
        save_memory: str,
        parity: bool,
        latent: Latent | None = None,
        mask: torch.Tensor | None = None,
        trajectory: object = None,
        negative: ConditioningList | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.runs.drag import Start, Words, drag_latent, reference_levels
        from ..retrace.pictures.drag_paths import draw_drag

        placed = require_points(points)
        host = ComfyHost(model)
        preset = DragSettings.reference() if parity else DragSettings(inversion=inversion)
        settings = replace(
            preset,
            mode=mode,
            changes=changes or None,
            learning_rate=learning_rate or None,
            mask_weight=None if mask_weight < 0 else mask_weight,
            patch_radius=None if patch_radius < 0 else patch_radius,
            search_radius=None if search_radius < 0 else search_radius,
            stop_radius=stop_radius,
            hard_mask=mask_mode == "hard",
            block=feature_block,
            recompute=SAVE_MEMORY[save_memory],
        )
        words = Words(positive, negative, cfg)
        if trajectory is not None:
            if sigmas is not None:
                raise InvalidInput("sigmas: a trajectory brings its own noise levels. Disconnect one of the two.")
            start = Start.of_trajectory(host, require_trajectory(trajectory), strength)
        elif latent is None:
            raise InvalidInput("there is nothing to drag. Connect a LATENT from 'VAE Encode', or a trajectory.")
        else:
            given = host.sigmas(scheduler, steps) if sigmas is None else sigmas
            begin = Start.of_noisy if latent_is == "noisy" else Start.of_image
            start = begin(host, latent_samples(latent), reference_levels(host, steps) if parity else given, strength)
        memory = PeakMemory()
        area = noise_mask(latent) if mask is None else mask
        outcome = drag_latent(host, start, words, placed, area, settings, _progress(cls.hidden, placed.size[1]))
        dragged = outcome.dragged
        report = dragged.text(memory.megabytes())
        picture = draw_drag(dragged)
        return io.NodeOutput(
            {"samples": outcome.samples},
            dragged.sigmas.clone(),  # core's uni_pc writes into the sigmas that it is given
            report,
            dragged.json(),
            picture,
            ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(report).as_dict()},
        )


def noise_mask(latent: object) -> torch.Tensor | None:
    """What 'Set Latent Noise Mask' has put on a LATENT, as a mask ``[B, H, W]``."""
    found = latent.get("noise_mask") if isinstance(latent, dict) else None
    return found.reshape(-1, *found.shape[-2:]) if isinstance(found, torch.Tensor) else None


def _progress(hidden: object, width: int) -> Callback:
    """Shows on the node how far the points still have to go, while it runs."""
    write = progress_text(hidden)

    def show(change: int, most: int, distances: list[float]) -> None:
        left = ", ".join(f"{distance * width:.0f}" for distance in distances[:8])
        write(f"iteration {change} of {most}: {left} pixels to go")

    return show
