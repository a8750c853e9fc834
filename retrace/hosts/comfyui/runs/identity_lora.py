"""Identity LoRA between ComfyUI's sockets: a LATENT and words in, a patched MODEL and core's LORA_MODEL out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....attention.lora.result import IdentityLora
from ....attention.lora.settings import LoraTraining
from ....attention.lora.train import Callback, train
from ....core.checks import check_latent
from ....core.errors import InvalidImage, InvalidInput, Remedy
from ....core.host import AdapterDenoiser, Conditioning
from ..conditioning import levels_may_mix, part_of_steps, require_conditioning
from ..host import ComfyHost
from ..network.lora import lora_model, patched, projection_layers
from ..plain import alias
from ..types import ConditioningList, Model


@dataclass(frozen=True)
class Trained:
    """A clone of the MODEL with the LoRA on it, the LoRA as core's LORA_MODEL, and how it went."""

    model: Model
    lora: dict[str, Tensor]
    result: IdentityLora


def train_lora(
    host: ComfyHost,
    samples: object,
    positive: ConditioningList,
    training: LoraTraining | None = None,
    callback: Callback | None = None,
) -> Trained:
    """Train on the ``samples`` of a LATENT under a CONDITIONING; see :func:`retrace.attention.lora.train.train`.

    Noise levels share a pass of the network only where nothing in the condition or on the model may depend on them.

    Raises:
        UnsupportedModel: not a UNet of the SD1.5 or SDXL kind, or quantised weights.
        InvalidImage: not a latent of this model.
        InvalidInput: a condition with a time range.
        RetraceError: what the library raises.
    """
    training = training or LoraTraining()
    projection_layers(host.model.model.diffusion_model)
    _check_words(positive)
    samples = check_latent("latent", samples, host.latent_channels)
    if not bool(torch.count_nonzero(samples)):
        raise InvalidImage("latent: it is empty, but an image to learn is needed.", Remedy.ENCODE_IMAGE)
    x0 = host.to_model_scale(samples.float())
    at_once = training.at_once if levels_may_mix(host.model, positive) else 1

    def method(denoiser: AdapterDenoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> IdentityLora:
        settings = replace(training, at_once=at_once)
        return train(denoiser, alias(x0), conds["positive"], host.training_sigmas(), settings, callback)

    # Core makes room for a batch of this shape.
    batch = x0[torch.arange(min(at_once, training.batch_size)) % len(x0)]
    result = host.run(batch, {"positive": positive}, method, gradients=True)
    lora = lora_model(host.model.model.diffusion_model, result.adapters)
    return Trained(patched(host.model, lora), lora, result)


def _check_words(positive: ConditioningList) -> None:
    if any(part_of_steps(options) for _, options in require_conditioning("positive", positive)):
        raise InvalidInput(
            "positive: this CONDITIONING holds for a part of the steps only, but a LoRA learns at all noise levels. "
            "Connect it without a time range."
        )
