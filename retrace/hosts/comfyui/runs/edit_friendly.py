"""Edit-friendly inversion between ComfyUI's sockets: its noises come out as a SAMPLER, which core's guiders drive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from torch import Tensor

from ....core.errors import InvalidInput, RetraceError
from ....core.host import Conditioning, Denoiser, Origin
from ....inversion.edit_friendly import EditFriendly, EditFriendlySettings, invert_edit_friendly
from ..conditioning import levels_may_mix
from ..host import ComfyHost
from ..latents import below_flow_top
from ..types import ConditioningList, Model, Options, Sampler

NODE = "Edit-friendly Inverter"


def prepare_edit_friendly(
    host: ComfyHost,
    samples: Tensor,
    sigmas: Tensor,
    positive: ConditioningList,
    negative: ConditioningList,
    settings: EditFriendlySettings,
) -> EditFriendly:
    """Invert the ``samples`` of a LATENT under two CONDITIONING lists; see :func:`.invert_edit_friendly`.

    Steps share a call of the model only where nothing in the conditions or on the model may depend on the noise level.
    Flow models whose levels begin at 1 begin at :data:`~..latents.FLOW_TOP` instead.
    """
    sigmas = below_flow_top(host.parametrisation, sigmas)
    x0 = host.to_model_scale(samples.float())
    images = len(x0)
    batch = min(settings.batch, len(sigmas) - 1) if levels_may_mix(host.model, positive, negative) else 1
    origin = Origin.of(host)

    def method(denoiser: Denoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> EditFriendly:
        together = replace(settings, batch=batch)
        return invert_edit_friendly(
            denoiser, latent[:images], sigmas, conds["positive"], conds["negative"], together, origin
        )

    # Core reserves memory for the batch that it is shown: show it the one that the model will get.
    conds = {"positive": positive, "negative": negative}
    return host.run(x0.repeat(batch, 1, 1, 1), conds, method)


def noise_sampler(found: EditFriendly) -> Sampler:
    """A core SAMPLER that adds the noises of ``found``, at its levels or a contiguous part of them only.

    The batch that it samples may be a whole multiple of the inverted one.
    """

    def sample_edit_friendly(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Options | None = None,
        callback: Any = None,
        disable: bool | None = None,
    ) -> Tensor:
        """DDPM steps with stored noises (Huberman-Spiegelglas et al. 2024)."""
        extra_args = extra_args or {}
        try:
            _check_run(model, extra_args)
            first = found.first_step(sigmas)
            found.require_latent(x)
        except RetraceError as error:
            raise type(error)(f"{NODE}: {error}") from error
        s_in = x.new_ones([x.shape[0]])
        for i in comfy.k_diffusion.sampling.trange(len(sigmas) - 1, disable=disable):
            denoised = model(x, sigmas[i] * s_in, **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = found.step(first + i, x, denoised)
        return x

    return comfy.samplers.KSAMPLER(sample_edit_friendly)


def _check_run(model: Model, extra_args: Options) -> None:
    noise = getattr(model, "noise", None)
    if isinstance(noise, Tensor) and bool(torch.count_nonzero(noise)):
        raise InvalidInput(
            "The sampler was told to add noise to the latent, but the noise that belongs to it is in there already. "
            "Switch add_noise off, or connect a 'DisableNoise'."
        )
    if extra_args.get("denoise_mask") is not None:
        raise InvalidInput(
            "The latent has a noise mask, and core would keep its noise outside of it. Remove the mask, and put a "
            "'Blend Step' between the model and the sampler to edit inside a mask only."
        )
