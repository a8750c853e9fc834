"""Edit-friendly inversion between ComfyUI's sockets: its noises come out as a SAMPLER, which core's guiders drive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from torch import Tensor

from ....core.errors import RetraceError
from ....core.host import Conditioning, Denoiser
from ....inversion.edit_friendly import EditFriendly, invert_edit_friendly
from ..cost import memory_lines
from ..host import ComfyHost
from .inversion import FLOW_TOP, noise_samples

NODE = "Edit-friendly Inverter"
# Core looks at the first row of a batch only to decide whether or how these act.
_TIMED = {"start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "hooks", "control"}


@dataclass(frozen=True)
class Prepared:
    """Noises, the latent to begin with in the scale of a LATENT socket, and how many steps shared a call."""

    found: EditFriendly
    latent: Tensor
    batch: int

    def sampler(self) -> Any:
        """A core SAMPLER for these noises."""
        return noise_sampler(self.found)

    def report(self, peak_megabytes: int | None = None) -> str:
        """What the inversion cost and what its noises are like, in lines of text."""
        facts = self.found.trajectory.report
        steps, images = self.found.noises.shape[:2]
        together = f"{self.batch} steps at a time" if self.batch > 1 else "one step at a time"
        lines = [
            f"edit_friendly, {steps} steps, {images} image(s), guidance {self.found.scale:g}, seed {facts['seed']}",
            f"start at noise level {float(self.found.trajectory.sigmas[0]):.3f}",
            f"{facts['evaluations']} network evaluations, {together}, {facts['seconds']:.1f} s",
        ]
        strengths = facts["strengths"]
        if isinstance(strengths, list) and strengths:
            average = sum(strengths) / len(strengths)
            lines.append(f"strength of the noises: {average:.2f} on average, {max(strengths):.2f} at most (fresh: 1)")
        return "\n".join([*lines, *memory_lines(peak_megabytes)])


def prepare_edit_friendly(
    host: ComfyHost,
    samples: Tensor,
    sigmas: Tensor,
    positive: Any,
    negative: Any,
    scale: float,
    *,
    seed: int,
    batch: int = 4,
) -> Prepared:
    """Invert the ``samples`` of a LATENT under two CONDITIONING lists; see :func:`retrace.inversion.edit_friendly`.

    Steps share a call of the model only where nothing in the conditions or on the model may depend on the noise level.
    Flow models whose levels begin at 1 begin at :data:`FLOW_TOP` instead.
    """
    if host.parametrisation == "flow" and float(sigmas[0]) > FLOW_TOP:
        sigmas = torch.cat([sigmas.new_tensor([FLOW_TOP]), sigmas[sigmas < FLOW_TOP]])
    x0 = host.to_model_scale(samples.float())
    images = len(x0)
    batch = min(batch, len(sigmas) - 1) if levels_may_mix(host.model, positive, negative) else 1
    fingerprint = host.fingerprint()

    def method(denoiser: Denoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> EditFriendly:
        return invert_edit_friendly(
            denoiser,
            latent[:images],
            sigmas,
            conds["positive"],
            conds["negative"],
            scale,
            seed=seed,
            batch=batch,
            fingerprint=fingerprint,
            latent_format=host.latent_format,
        )

    # Core reserves memory for the batch that it is shown: show it the one that the model will get.
    conds = {"positive": positive, "negative": negative}
    found: EditFriendly = host.run(x0.repeat(batch, 1, 1, 1), conds, method)
    return Prepared(found, noise_samples(host, found.trajectory), batch)


def levels_may_mix(model: Any, *conditionings: Any) -> bool:
    """Whether latents of different noise levels may share a call: no time ranges, hooks, ControlNets or patches."""
    options = model.model_options
    patched = (
        any(options.get("transformer_options", {}).values())
        or "model_function_wrapper" in options
        or any(wrappers for kind in model.wrappers.values() for wrappers in kind.values())
    )
    return not patched and not any(_TIMED & entry[1].keys() for conds in conditionings for entry in conds)


def noise_sampler(found: EditFriendly) -> Any:
    """A core SAMPLER that adds the noises of ``found``, at its levels or a contiguous part of them only.

    The batch that it samples may be a whole multiple of the inverted one.
    """

    def sample_edit_friendly(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
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


def _check_run(model: Any, extra_args: Mapping[str, Any]) -> None:
    noise = getattr(model, "noise", None)
    if isinstance(noise, Tensor) and bool(torch.count_nonzero(noise)):
        raise RetraceError(
            "The sampler was told to add noise to the latent, but the noise that belongs to it is in there already. "
            "Switch add_noise off, or connect a 'DisableNoise'."
        )
    if extra_args.get("denoise_mask") is not None:
        raise RetraceError(
            "The latent has a noise mask, and core would keep its noise outside of it. Remove the mask, and put a "
            "'Blend Step' between the model and the sampler to edit inside a mask only."
        )
