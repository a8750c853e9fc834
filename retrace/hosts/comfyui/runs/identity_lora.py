"""Identity LoRA between ComfyUI's sockets: a LATENT and words in, a patched MODEL and core's LORA_MODEL out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....attention.identity_lora import PROBES, Callback, IdentityLora, LoraTraining, train
from ....core.checks import check_latent
from ....core.errors import InvalidImage, RetraceError
from ....core.host import AdapterDenoiser, Conditioning
from ....core.report import memory_lines
from ..conditioning import levels_may_mix, part_of_steps, require_conditioning
from ..host import ComfyHost
from ..network.lora import lora_model, patched, projection_layers
from ..plain import alias


@dataclass(frozen=True)
class Trained:
    """A clone of the MODEL with the LoRA on it, the LoRA as core's LORA_MODEL, and how it went."""

    model: Any
    lora: dict[str, Tensor]
    training: LoraTraining
    result: IdentityLora

    def report(self, peak_megabytes: int | None = None) -> str:
        """What the LoRA has learnt and what that cost, in lines of text."""
        result, training = self.result, self.training
        lines = [
            f"rank {result.rank}, {training.steps} steps of {training.batch_size} noise levels, "
            f"learning rate {training.learning_rate:g}, seed {training.seed}",
            f"loss at {PROBES} fixed noise levels: {result.before:.4f} before, {result.after:.4f} after",
            f"{result.evaluations} network evaluations, {result.backwards} backward passes, {result.seconds:.1f} s",
        ]
        return "\n".join([*lines, *memory_lines(peak_megabytes, result.recompute, training.recompute)])


def train_lora(
    host: ComfyHost,
    samples: Tensor,
    positive: Any,
    training: LoraTraining | None = None,
    callback: Callback | None = None,
) -> Trained:
    """Train on the ``samples`` of a LATENT under a CONDITIONING; see :func:`retrace.attention.identity_lora.train`.

    Noise levels share a pass of the network only where nothing in the condition or on the model may depend on them.

    Raises:
        UnsupportedModel: not a UNet of the SD1.5 or SDXL kind, or quantised weights.
        InvalidImage: not a latent of this model.
        RetraceError: a condition with a time range, or what the library raises.
    """
    training = training or LoraTraining()
    projection_layers(host.model.model.diffusion_model)
    _check_words(positive)
    check_latent("latent", samples, host.latent_channels)
    if not bool(torch.count_nonzero(samples)):
        raise InvalidImage("latent: it is empty. Connect the picture that the LoRA shall learn, from 'VAE Encode'.")
    x0 = host.to_model_scale(samples.float())
    at_once = training.at_once if levels_may_mix(host.model, positive) else 1

    def method(denoiser: AdapterDenoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> IdentityLora:
        settings = replace(training, at_once=at_once)
        return train(denoiser, alias(x0), conds["positive"], host.training_sigmas(), settings, callback)

    # Core makes room for a batch of this shape.
    batch = x0[torch.arange(min(at_once, training.batch_size)) % len(x0)]
    result: IdentityLora = host.run(batch, {"positive": positive}, method, gradients=True)
    lora = lora_model(host.model.model.diffusion_model, result.adapters)
    return Trained(patched(host.model, lora), lora, training, result)


def _check_words(positive: Any) -> None:
    if any(part_of_steps(options) for _, options in require_conditioning("positive", positive)):
        raise RetraceError(
            "positive: this CONDITIONING holds for a part of the steps only, but a LoRA learns at all noise levels. "
            "Connect it without a time range."
        )
