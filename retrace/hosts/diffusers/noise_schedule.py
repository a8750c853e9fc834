"""Noise levels of a discrete diffusion model, and the schedulers of ComfyUI by name.

A discrete model was trained at ``T`` noise levels. Everything here is expressed in sigma, the standard deviation of the
noise in ``x = x0 + sigma * noise`` (Karras et al. 2022, arXiv 2206.00364, table 1, column VE). The schedulers give the
same values as ComfyUI's, which the contract tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InvalidSchedule, UnsupportedModel

SCHEDULERS = ("normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform")

# With zero terminal signal the last sigma would be infinite; this much signal is left instead, as ComfyUI does.
_LAST_ALPHA_BAR = 4.8973451890853435e-08


@dataclass(frozen=True)
class NoiseSchedule:
    """The ascending training noise levels ``sigmas`` ``[T]``, float32 on the CPU."""

    sigmas: Tensor

    @property
    def log_sigmas(self) -> Tensor:
        return self.sigmas.log()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The index of the training level nearest to ``sigma`` in log space, same shape, integer."""
        distance = (sigma.to(self.sigmas).log().reshape(-1, 1) - self.log_sigmas).abs()
        return distance.argmin(1).reshape(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level at a fractional timestep, by linear interpolation in log space."""
        place = timestep.float().clamp(0, len(self.sigmas) - 1)
        low, weight = place.floor().long(), place.frac()
        log = self.log_sigmas
        return torch.lerp(log[low], log[place.ceil().long()], weight).exp()

    def steps(self, scheduler: str, steps: int) -> Tensor:
        """``[N + 1]`` descending noise levels of ``scheduler``, the last one 0; N is ``steps``.

        ``ddim_uniform`` takes whole strides through the training levels, so N may exceed ``steps`` where it does not
        divide them, as in ComfyUI.

        Raises:
            InvalidSchedule: ``steps`` < 1 or more than there are training levels; a name outside :data:`SCHEDULERS`.
        """
        count = len(self.sigmas)
        if not 1 <= steps <= count:
            raise InvalidSchedule(f"Got {steps} steps; the model needs 1 to {count}. Set steps in that range.")
        if scheduler == "simple":
            # From the noisiest level downwards in equal strides, rounded down.
            chosen = [self.sigmas[count - 1 - int(i * (count / steps))] for i in range(steps)]
            levels = torch.stack(chosen)
        elif scheduler == "ddim_uniform":
            # Equal strides upwards from timestep 1, as DDIM's leading grid with offset 1.
            levels = self.sigmas[1 :: max(count // steps, 1)].flip(0)
        elif scheduler in ("normal", "sgm_uniform"):
            points = steps + 1 if scheduler == "sgm_uniform" else steps
            times = torch.linspace(count - 1, 0, points)
            levels = self.sigma(times[:steps])
        elif scheduler == "karras":
            # Karras et al. 2022, eq. 5 with rho = 7.
            low, high = float(self.sigmas[0]) ** (1 / 7), float(self.sigmas[-1]) ** (1 / 7)
            levels = (high + torch.linspace(0, 1, steps) * (low - high)) ** 7
        elif scheduler == "exponential":
            levels = torch.linspace(math.log(float(self.sigmas[-1])), math.log(float(self.sigmas[0])), steps).exp()
        else:
            raise InvalidSchedule(f"Unknown scheduler '{scheduler}'. Choose one of {', '.join(SCHEDULERS)}.")
        return torch.cat([levels, levels.new_zeros(1)])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The levels of a diffusers scheduler configuration.

        Raises:
            UnsupportedModel: a beta schedule that is not linear, scaled linear, squared cosine or given as numbers.
        """
        count = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
        kind, given = config.get("beta_schedule", "scaled_linear"), config.get("trained_betas")
        if given is not None:
            betas = torch.as_tensor(given, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        elif kind == "squaredcos_cap_v2":
            # Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
            time = torch.arange(count + 1, dtype=torch.float64) / count
            alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            raise UnsupportedModel(
                f"The model's scheduler has the beta schedule '{kind}'; this host knows scaled_linear, linear and "
                "squaredcos_cap_v2. Use a Stable Diffusion 1.x, 2.x or XL model."
            )
        alpha_bar = torch.cumprod(1 - betas, 0)
        if config.get("rescale_betas_zero_snr", False):
            # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: shift the last signal to 0, keep the first.
            root = alpha_bar.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alpha_bar = root**2
            alpha_bar[-1] = _LAST_ALPHA_BAR
        return cls(((1 - alpha_bar) / alpha_bar).sqrt().float())
