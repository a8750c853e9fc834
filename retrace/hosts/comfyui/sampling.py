"""What a ComfyUI model predicts and at which noise levels."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ...core.errors import InvalidSchedule, UnsupportedModel
from ...core.host import Parametrisation
from .types import ModelSampling

RETRACING_SAMPLERS = ("ddim", "euler")
"""Samplers that walk an inverted path back step by step."""

STOCHASTIC_SAMPLERS = frozenset(
    {
        "euler_ancestral",
        "euler_ancestral_cfg_pp",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_2s_ancestral_cfg_pp",
        "dpmpp_sde",
        "dpmpp_sde_gpu",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "exp_heun_2_x0_sde",
        "res_multistep_ancestral",
        "res_multistep_ancestral_cfg_pp",
        "ddpm",
        "lcm",
        "er_sde",
        "seeds_2",
        "seeds_3",
        "sa_solver",
        "sa_solver_pece",
    }
)
"""Samplers that add fresh noise while they run (with their default options)."""


def require_deterministic(sampler_name: str) -> None:
    """Refuse a sampler that adds noise on its way: it cannot come back to the image that was inverted.

    Names that core does not have are refused when they say so themselves ("ancestral", "sde").

    Raises:
        InvalidSchedule: the sampler is stochastic; the message names it and those that retrace.
    """
    if sampler_name in STOCHASTIC_SAMPLERS or not {"ancestral", "sde"}.isdisjoint(sampler_name.lower().split("_")):
        raise InvalidSchedule(
            f"The sampler '{sampler_name}' adds fresh noise at every step, so it cannot retrace an inverted image. "
            f"Choose one of: {', '.join(RETRACING_SAMPLERS)}."
        )


def parametrisation(model_sampling: ModelSampling) -> Parametrisation:
    """``eps``, ``v`` or ``flow``; raises :class:`UnsupportedModel` for any other formula.

    Judged by the formula itself, not by inheritance: core derives x0- and EDM-prediction from the eps class, and other
    packs (LCM) override it.
    """
    known: list[tuple[Parametrisation, Any]] = [
        ("eps", comfy.model_sampling.EPS),
        ("v", comfy.model_sampling.V_PREDICTION),
        ("flow", comfy.model_sampling.CONST),
    ]
    kind = type(model_sampling)
    for name, base in known:
        if (
            getattr(kind, "calculate_denoised", None) is base.calculate_denoised
            and getattr(kind, "calculate_input", None) is base.calculate_input
        ):
            if float(getattr(model_sampling, "noise_scale", 1.0)) != 1.0:
                raise UnsupportedModel(
                    f"The model is trained with noise of strength {model_sampling.noise_scale}, and editing methods "
                    "count on 1. Use another model."
                )
            return name
    owner = next((c for c in kind.__mro__ if "calculate_denoised" in vars(c)), kind)
    raise UnsupportedModel(
        f"The model predicts by '{owner.__name__}', which is none of the kinds that editing methods know: "
        "eps (SD1.5, SDXL), v (SD2.1-v and v-prediction fine-tunes), flow (Flux, SD3). "
        "Remove a ModelSampling node in front of this one, or use a model of such a kind."
    )


def training_sigmas(model_sampling: ModelSampling) -> Tensor:
    """Noise levels of the training timesteps, ascending ``[T]``, on the CPU."""
    with torch.inference_mode(False), torch.no_grad():
        return model_sampling.sigmas.detach().to("cpu", torch.float32, copy=True)  # type: ignore[no-any-return]


def scheduled_sigmas(model_sampling: ModelSampling, scheduler: str, steps: int) -> Tensor:
    """Descending noise levels of core's scheduler, the last one 0, on the CPU.

    ``[steps + 1]`` levels for most schedulers. ``ddim_uniform`` and ``beta`` may give another number where the steps do
    not divide the training timesteps; they are returned as core's own samplers would walk them.
    """
    names = list(comfy.samplers.SCHEDULER_NAMES)
    if scheduler not in names:
        raise InvalidSchedule(f"There is no scheduler '{scheduler}' in this ComfyUI. It knows: {', '.join(names)}.")
    if steps < 1:
        raise InvalidSchedule(f"{steps} steps were asked for; at least 1 is needed.")
    with torch.inference_mode(False), torch.no_grad():
        return comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps).to("cpu", torch.float32, copy=True)  # type: ignore[no-any-return]
