"""Prompt-to-Prompt and what keeps its source in place: Prompt-to-Prompt, Direct Inversion, Proximal Guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..retrace import prompt_to_prompt as p2p
from ..retrace.core.checks import check_latent
from ..retrace.core.errors import InvalidImage, Remedy
from ..retrace.core.prompt import parse_values, parse_word_lists
from ..retrace.pictures.token_map import token_pictures
from ..retrace.prompt_to_prompt.proximal import KINDS, Kind, Proximal
from ._checks import latent_samples, require_trajectory
from ._errors import reports_errors
from ._schema import Trajectory, advanced, schema


def _share(name: str, default: float, tooltip: str, **more: Any) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, round=0.001, tooltip=tooltip, **more)


if TYPE_CHECKING:
    from ..retrace.hosts.comfyui.types import Clip, Latent, Model


class PromptToPromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "prompts",
            node_id="RetracePromptToPrompt",
            display_name="Prompt-to-Prompt",
            description="Edits an image by editing its prompt: source and targets are sampled side by side, and the "
            "targets take over the source's attention maps, which hold its layout. Connect MODEL, positive and LATENT "
            "to a KSampler whose sampler adds no noise along the way (euler, ddim, dpmpp_2m ...); the first image "
            "that comes out is the source, followed by one for each target.",
            search_aliases=["p2p", "prompt to prompt", "attention control", "word swap", "reweight", "attend"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; the input model stays unchanged."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Latent.Input(
                    "latent",
                    tooltip="What to start from: the noise of an inversion to edit your photo, or an empty latent for "
                    "a new image.",
                ),
                io.String.Input(
                    "source",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="A prompt that describes the image as it is.",
                ),
                io.String.Input(
                    "targets",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="Prompts for the edited image. One edit per line; all are made at once.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(p2p.MODES),
                    default="replace",
                    tooltip="replace: a changed word takes the place of the old one, in its shape. refine: only words "
                    "that both prompts share keep their maps; changed and new words are free.",
                ),
                _share("cross_replace", 0.8, "The share of the steps in which words keep their place. Lower is freer."),
                _share(
                    "self_replace",
                    0.4,
                    "The share of the steps in which the layout is kept. Lower lets shapes change more.",
                ),
                io.String.Input(
                    "word_weights",
                    default="",
                    tooltip="How much words of the targets count, for example 'red: 2, star: 0.5'. Below 0 pushes a "
                    "word out.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip="Local blend: only what these words show may change, for example 'circle, square'. Give "
                    "the word from the source and the one from the target. A list for each prompt: 'circle | square'. "
                    "Empty: off.",
                ),
                io.String.Input(
                    "keep_words",
                    default="",
                    tooltip="Local blend: what these words show stays, even where it overlaps the others.",
                    **advanced(),
                ),
                _share(
                    "blend_threshold", 0.3, "Local blend: the threshold for the region of the words. Higher is tighter."
                ),
                _share("blend_start", 0.2, "Local blend: the share of the steps before it starts.", **advanced()),
                io.String.Input(
                    "word_windows",
                    default="",
                    tooltip="A separate cross_replace for single words of the targets, for example 'square: 0.3'.",
                    **advanced(),
                ),
                io.Int.Input(
                    "self_limit",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Apply self_replace only in layers of at most this many cells per side.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip="On: align words exactly as the authors' code does, including its errors.",
                    **advanced(),
                ),
                _share(
                    "cross_start",
                    0.0,
                    "The share of the steps in which words are free at first; cross_replace says where it ends.",
                    optional=True,
                    **advanced(),
                ),
                _share(
                    "self_start",
                    0.0,
                    "The share of the steps in which the layout is free at first; self_replace says where it ends.",
                    optional=True,
                    **advanced(),
                ),
                io.Float.Input(
                    "keep_threshold",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip="Local blend: the threshold for the region of keep_words. Below 0: that of "
                    "blend_threshold.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Model.Output("edited_model", display_name="MODEL", tooltip="The patched model, for the sampler."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="All prompts, source first."),
                io.Latent.Output("batch", display_name="LATENT", tooltip="The latent, once for each prompt."),
                io.String.Output("report", display_name="report", tooltip="Which word replaced which."),
                io.Image.Output(
                    "token_map",
                    display_name="token_map",
                    tooltip="The same as a table for each target: rows are the source's words, columns the target's.",
                ),
            ],
        )

    @classmethod
    @reports_errors("Prompt-to-Prompt")
    def execute(
        cls,
        model: Model,
        clip: Clip,
        latent: Latent,
        source: str,
        targets: str,
        mode: p2p.Mode,
        cross_replace: float,
        self_replace: float,
        word_weights: str,
        blend_words: str,
        keep_words: str,
        blend_threshold: float,
        blend_start: float,
        word_windows: str,
        self_limit: int,
        parity: bool,
        cross_start: float = 0.0,
        self_start: float = 0.0,
        keep_threshold: float = -1.0,
    ) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.prompt_to_prompt import edit_by_words

        samples = check_latent("latent", latent_samples(latent, "DDIM Inverter"))
        if samples.shape[0] != 1:
            raise InvalidImage(
                f"latent: got a batch of {samples.shape[0]}, but one latent is needed: every prompt starts from it.",
                Remedy.TAKE_ONE_LATENT,
            )
        texts = [source, *(line for line in targets.splitlines() if line.strip())]
        settings = p2p.PlanSettings(
            mode=mode,
            cross_replace=(min(cross_start, cross_replace), cross_replace),
            self_replace=(min(self_start, self_replace), self_replace),
            self_limit=self_limit,
            word_windows={word: (0.0, end) for word, end in parse_values("word_windows", word_windows).items()},
            weights=parse_values("word_weights", word_weights),
            align=p2p.reference_token_map if parity else p2p.token_map,
        )
        blend = p2p.BlendWords(
            words=parse_word_lists(blend_words),
            keep=parse_word_lists(keep_words),
            threshold=blend_threshold,
            keep_threshold=None if keep_threshold < 0 else keep_threshold,
            start=blend_start,
        )
        prepared = edit_by_words(model, clip, texts, settings, blend)
        report = p2p.describe_edit(prepared.edit)
        return io.NodeOutput(
            prepared.model,
            prepared.positive,
            _repeated(latent, samples, len(texts)),
            report,
            token_pictures(prepared.edit),
            ui=ui.PreviewText(report),
        )


def _repeated(latent: Latent, samples: Tensor, count: int) -> Latent:
    """The LATENT once for each prompt. What else it holds stays, so that core draws the noise of the same image."""
    batch = {**latent, "samples": samples.repeat(count, 1, 1, 1)}
    if "batch_index" in latent:
        batch["batch_index"] = list(latent["batch_index"]) * count
    return batch


class DirectInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceDirectInversion",
            display_name="Direct Inversion",
            description="Holds the source of an edit on its inversion path at any cfg, so that it is reproduced "
            "exactly and its attention guides the targets, with nothing to optimise (Direct Inversion, PnP Inversion).",
            search_aliases=["pnp inversion", "source branch", "negative prompt inversion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch, before or after 'Prompt-to-Prompt'."),
                Trajectory.Input("trajectory", tooltip="The inversion of a single image, from 'DDIM Inverter'."),
            ],
            outputs=[
                io.Model.Output(
                    "held_model",
                    display_name="MODEL",
                    tooltip="The patched model, which holds the first image of a batch. Sample with the inverter's "
                    "SIGMAS.",
                )
            ],
        )

    @classmethod
    @reports_errors("Direct Inversion")
    def execute(cls, model: Model, trajectory: object) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.direct_inversion import patch_direct_inversion

        return io.NodeOutput(patch_direct_inversion(model, require_trajectory(trajectory)))


class ProximalGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "inversion",
            node_id="RetraceProximalGuidance",
            display_name="Proximal Guidance",
            description="Lets guidance change only what it changes strongly, and leaves the rest of the image alone. "
            "With the source prompt as the negative, this is proximal negative-prompt inversion (ProxEdit).",
            search_aliases=["proxnpi", "npi", "proxedit", "cfg threshold", "negative prompt inversion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; the input model stays unchanged."),
                io.Float.Input(
                    "quantile",
                    default=0.7,
                    min=0.0,
                    max=0.999,
                    step=0.05,
                    round=0.001,
                    tooltip="This share of the latent's values, the ones that guidance changes least, stays "
                    "unchanged. 0: off.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="hard",
                    tooltip="hard: the rest changes in full. soft: the threshold is subtracted from the change, so "
                    "that nothing jumps.",
                ),
            ],
            outputs=[
                io.Model.Output("guided_model", display_name="MODEL", tooltip="The patched model, for any sampler.")
            ],
        )

    @classmethod
    @reports_errors("Proximal Guidance")
    def execute(cls, model: Model, quantile: float, kind: Kind) -> io.NodeOutput:
        from ..retrace.hosts.comfyui.patches.proximal import patch_proximal

        return io.NodeOutput(patch_proximal(model, Proximal(quantile, kind)))
