"""Reference KV Control: edits look at the reference image beside them while a sampler works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ._errors import reports_errors
from ._schema import schema

if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Model

_AUTO = -1


class ReferenceKVControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "drag",
            node_id="RetraceReferenceKVControl",
            display_name="Reference KV Control",
            description="Patches a model so that every image of a batch keeps the appearance of the first one: "
            "self-attention takes its keys and values from there (DragDiffusion, MasaCtrl). Sample a batch "
            "[reference, edit, ...].",
            search_aliases=["masactrl", "mutual self-attention", "reference only", "dragdiffusion", "reference latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; the input model stays unchanged."),
                io.Int.Input(
                    "first_layer",
                    default=_AUTO,
                    min=_AUTO,
                    max=1000,
                    tooltip="Number of the first self-attention layer that reads the reference; all later layers read "
                    "it as well. -1 chooses: 10 of the 16 in SD1.5 (as the authors do), 34 of the 70 in SDXL, the "
                    "second half of Flux, SD3 and similar models. Lower keeps more of the reference's layout.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling it starts. Later lets the edit differ more.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling it ends. Earlier leaves the finest details to the edit.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "controlled_model",
                    display_name="MODEL",
                    tooltip="The patched model, for any sampler that is given a batch [reference, edit, ...].",
                )
            ],
        )

    @classmethod
    @reports_errors("Reference KV Control")
    def execute(cls, model: Model, first_layer: int, start_percent: float, end_percent: float) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        first = None if first_layer == _AUTO else first_layer
        patched = patch_reference_kv(model, first, start_percent=start_percent, end_percent=end_percent)
        return io.NodeOutput(patched)
