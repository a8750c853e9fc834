"""Null-text inversion: Null-text Optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..retrace.inversion.null_text.settings import MODES, Mode, NullTextSettings
from ._checks import require_trajectory
from ._errors import reports_errors
from ._memory import PeakMemory
from ._progress import progress_text
from ._schema import Trajectory, advanced, schema, seed_input

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import ConditioningList, Model
    from ..retrace.inversion.null_text.optimise import Callback, NullTextStep


class NullTextOptimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceNullTextOptimizer",
            display_name="Null-text Optimizer",
            description="Optimises the negative embedding of every step so that sampling at your cfg reproduces an "
            "inverted image exactly (Null-text Inversion). Run it once; edits with other prompts then keep the rest "
            "of the image.",
            search_aliases=["null text inversion", "negative prompt inversion", "npi", "nti", "pivotal inversion"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that inverted the image."),
                io.Conditioning.Input("positive", tooltip="The prompt used for the inversion."),
                io.Conditioning.Input("negative", tooltip="Usually an empty prompt. Its embedding is optimised."),
                Trajectory.Input("trajectory", tooltip="From 'DDIM Inverter' or 'Load Inversion'. Batches work."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=-30.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The cfg you will sample with.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="pivotal",
                    tooltip="pivotal is the method itself; the others are the paper's ablations.\n"
                    "global: one embedding for all steps. random_pivot: a random path instead of the inverted one. "
                    "no_pivot: fresh noise in every iteration. prompt, prompt_no_pivot: optimise the positive "
                    "embedding.",
                ),
                io.Int.Input("inner_steps", default=10, min=1, max=1000, tooltip="Maximum iterations per step."),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=1e-6,
                    max=1.0,
                    step=0.001,
                    round=1e-6,
                    tooltip="The learning rate at the first step; it falls to half of this over the steps.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    tooltip="The loss at which the first step is good enough; this threshold rises by 0.001 over the "
                    "steps. 0: never stop early.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: exactly the authors' code. Off: an equally good result with fewer evaluations.",
                    **advanced(),
                ),
                seed_input("Seed of the noise for random_pivot, no_pivot and prompt_no_pivot.", **advanced()),
                io.Combo.Input(
                    "start",
                    options=["positive", "negative"],
                    default="positive",
                    optional=True,
                    tooltip="Where the embedding starts. positive: takes a fifth of the time. negative: as in the "
                    "paper; better for edits with other prompts at a high cfg, which then keep more of the image.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "optimised_negative",
                    display_name="negative",
                    tooltip="One negative embedding per step; valid only for the same scheduler and steps.",
                ),
                io.Conditioning.Output(
                    "optimised_positive",
                    display_name="positive",
                    tooltip="The positive as it came in; optimised in the prompt modes.",
                ),
                io.Latent.Output(
                    "noise_latent",
                    display_name="LATENT",
                    tooltip="The noise to start from; sample without adding noise.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How accurate the result is, and how long it took."
                ),
            ],
        )

    @classmethod
    @reports_errors("Null-text Optimizer")
    def execute(
        cls,
        model: Model,
        positive: ConditioningList,
        negative: ConditioningList,
        trajectory: object,
        cfg: float,
        mode: Mode,
        inner_steps: int,
        learning_rate: float,
        early_stop: float,
        parity: bool,
        seed: int,
        start: str = "positive",
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.runs.null_text import optimise

        host = ComfyHost(model)
        memory = PeakMemory()
        settings = NullTextSettings(
            scale=cfg,
            mode=mode,
            iterations=inner_steps,
            learning_rate=learning_rate,
            early_stop=early_stop,
            seed=seed,
            start="cond" if start == "positive" else "uncond",
        )
        optimised = optimise(
            host,
            require_trajectory(trajectory),
            positive,
            negative,
            settings.reference() if parity else settings,
            callback=_progress(cls.hidden),
        )
        report = optimised.result.text(memory.megabytes())
        return io.NodeOutput(
            optimised.negative,
            optimised.positive,
            {"samples": optimised.noise},
            report,
            ui=ui.PreviewText(report),
        )


def _progress(hidden: Any) -> Callback:
    """Shows on the node how each step went, while it runs."""
    write = progress_text(hidden)

    def show(done: NullTextStep) -> None:
        write(
            f"step {done.step} of {done.total}: {done.iterations} iterations, loss {done.loss:.1e}, "
            f"{done.psnr:.1f} dB from the path"
        )

    return show
