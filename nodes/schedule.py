"""Reference Schedule: the timesteps that the papers' code uses, as SIGMAS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..retrace.core.schedule import GRIDS, grid_sigmas, reference_sigmas
from ._errors import reports_errors
from ._schema import advanced, schema

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Model


class ReferenceSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "schedule",
            node_id="RetraceReferenceSchedule",
            display_name="Reference Schedule",
            description="Gives the noise levels that the authors' code of an editing method uses. For everything "
            "else, ComfyUI's own scheduler nodes give SIGMAS.",
            search_aliases=["ddim schedule", "timesteps", "sigmas", "leading", "trailing"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose training noise levels are used."),
                io.Combo.Input(
                    "grid",
                    options=list(GRIDS),
                    default="leading_1",
                    tooltip="\n".join(f"{name}: {grid.title}" for name, grid in GRIDS.items()),
                ),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Number of steps."),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: end exactly where the reference ends, which may leave a little noise. Off: end at 0.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="SIGMAS", tooltip="For DDIM Inverter and SamplerCustom: noisiest first."
                )
            ],
        )

    @classmethod
    @reports_errors("Reference Schedule")
    def execute(cls, model: Model, grid: str, steps: int, parity: bool) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost

        sigmas = reference_sigmas if parity else grid_sigmas
        return io.NodeOutput(sigmas(grid, ComfyHost(model).training_sigmas(), steps))
