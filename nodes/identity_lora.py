"""Identity LoRA: a model learns one image before it is edited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..retrace.attention.lora.settings import LoraTraining
from ..retrace.pictures.loss_plot import RunningMean, loss_picture
from ._checks import latent_samples
from ._errors import reports_errors
from ._memory import PeakMemory
from ._progress import progress_text
from ._schema import SAVE_MEMORY, advanced, save_memory_input, schema, seed_input

if TYPE_CHECKING:
    from ..retrace.attention.lora.train import Callback
    from ..retrace.hosts.comfyui.types import ConditioningList, Latent, Model


class IdentityLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "drag",
            node_id="RetraceIdentityLoRA",
            display_name="Identity LoRA",
            description="Trains a small LoRA on the image that you are about to edit, so that the model preserves "
            "what it shows (DragDiffusion). Once per image: edits with other points or prompts do not train again.",
            search_aliases=["train lora", "dragdiffusion", "dreambooth", "overfit", "fine-tune"],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model; the input model stays unchanged."),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the image as it is."),
                io.Latent.Input(
                    "latent", tooltip="The image, from 'VAE Encode'. A batch: several images of the same subject."
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=256, tooltip="How much the LoRA can learn; 16 in the authors' code."
                ),
                io.Int.Input(
                    "steps",
                    default=80,
                    min=1,
                    max=10000,
                    tooltip="Training steps. Beyond 80, DragDiffusion gains nothing more. Many more overfit the image "
                    "and resist edits.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=5e-4,
                    min=1e-7,
                    max=0.1,
                    step=1e-4,
                    round=1e-7,
                    tooltip="The learning rate; 0.0005 in the authors' code.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Random noise levels per training step. Time grows with it; memory does not.",
                ),
                seed_input("Seed of the LoRA's initial values, the noise levels and the noise."),
                io.Int.Input(
                    "at_once",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="How many of a step's noise levels go through the model together. More is faster and uses "
                    "more memory; the LoRA is the same.",
                    **advanced(),
                ),
                save_memory_input(),
                io.Float.Input(
                    "weight_decay",
                    default=1e-2,
                    min=0.0,
                    max=0.99,
                    step=1e-3,
                    round=1e-6,
                    tooltip="How strongly AdamW pulls the LoRA towards zero.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched_model", display_name="MODEL", tooltip="The model with the LoRA, for inversion and edits."
                ),
                io.LoraModel.Output(
                    "lora",
                    display_name="LORA_MODEL",
                    tooltip="The LoRA itself, for 'Save LoRA Weights', or for 'Load LoRA Model' at another strength.",
                ),
                io.LossMap.Output("loss_map", display_name="LOSS_MAP", tooltip="The losses, for 'Plot Loss Graph'."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was learnt, and the time and memory it took."
                ),
            ],
        )

    @classmethod
    @reports_errors("Identity LoRA")
    def execute(
        cls,
        model: Model,
        positive: ConditioningList,
        latent: Latent,
        rank: int,
        steps: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        at_once: int = 1,
        save_memory: str = "auto",
        weight_decay: float = 1e-2,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui import ComfyHost
        from ..retrace.hosts.comfyui.runs.identity_lora import train_lora

        training = LoraTraining(
            rank=rank,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            at_once=at_once,
            weight_decay=weight_decay,
            recompute=SAVE_MEMORY[save_memory],
            seed=seed,
        )
        memory = PeakMemory()
        trained = train_lora(ComfyHost(model), latent_samples(latent), positive, training, _progress(cls.hidden))
        losses = trained.result.losses
        report = trained.result.text(memory.megabytes())
        preview = ui.PreviewImage(loss_picture(losses), cls=cls)
        return io.NodeOutput(
            trained.model,
            trained.lora,
            {"loss": losses},
            report,
            ui={**preview.as_dict(), **ui.PreviewText(report).as_dict()},
        )


def _progress(hidden: object) -> Callback:
    """Shows on the node how the loss goes, while it runs."""
    write = progress_text(hidden)
    mean = RunningMean()

    def show(step: int, total: int, loss: float) -> None:
        write(f"step {step} of {total}: loss {mean.add(loss):.4f} on average")

    return show
