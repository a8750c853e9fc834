"""Blended Latent Diffusion: keep everything outside a mask while a sampler works (Avrahami et al. 2023, Algorithm 1).

At every noise level the latent outside the mask is replaced by the source image at that level, so the sampler sees a
true surrounding and the edit grows into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.checks import check_latent, check_mask
from ..core.errors import InvalidImage, InvalidSchedule
from ..core.host import Parametrisation, add_noise
from ..core.schedule import step_of
from ..core.trajectory import Trajectory
from ..masks import shrink_schedule

NoiseMode = Literal["fixed", "fresh", "trajectory"]
Level = Literal["next", "current"]


@dataclass(frozen=True)
class Blend:
    """What to keep and how; :meth:`start` makes the state of one sampling run.

    ``source``: clean latent ``[B, C, h, w]`` in the model's scale, or the :class:`Trajectory` of its inversion.

    ``mask``: ``[B or 1, h, w]`` in 0..1 on the latent grid, 1 where the sampler may change; values between mix.

    ``noise``: ``"fixed"`` one noise for all steps, ``"fresh"`` a new one every step (the paper), ``"trajectory"`` the
    stored latents of the inversion, which need no noise at all.

    ``level``: at which noise level the background is when a step at sigma_i begins. ``"next"``: at sigma_i, the level
    that the foreground has. ``"current"``: at sigma_{i-1}, one step noisier, as the reference code of Blended Diffusion
    does.

    ``stages``: progressive shrinking for thin masks: this many dilated masks first, the given mask last.
    """

    source: Tensor | Trajectory
    mask: Tensor
    parametrisation: Parametrisation
    noise: NoiseMode = "fixed"
    level: Level = "next"
    stages: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise == "trajectory" and not isinstance(self.source, Trajectory):
            raise InvalidImage(
                "Background noise 'trajectory' needs the TRAJECTORY of a DDIM Inverter as its source, and only a "
                "LATENT is connected. Connect the trajectory, or choose 'fixed' or 'fresh'."
            )
        source = check_latent("source", self.clean)
        check_mask("mask on the latent grid", self.mask, size=(source.shape[-2], source.shape[-1]), allow_empty=True)

    @property
    def clean(self) -> Tensor:
        """The source without noise, ``[B, C, h, w]``."""
        return self.source.source if isinstance(self.source, Trajectory) else self.source

    def start(self, sigmas: Tensor, like: Tensor) -> BlendRun:
        """The state for one run over ``sigmas`` (descending ``[N + 1]``) of latents like ``like`` ``[B, C, h, w]``.

        Raises :class:`InvalidImage` when source and run differ in size or channels, or their batches do not fit.
        """
        clean = self.clean
        if clean.shape[1:] != like.shape[1:] or clean.shape[0] not in (1, like.shape[0]):
            raise InvalidImage(
                f"Blend Step keeps a source latent of shape {tuple(clean.shape)}, but the sampler works on "
                f"{tuple(like.shape)}. Sample at the size of the source; its batch must be 1 or that of the sampler."
            )
        if self.mask.shape[0] not in (1, like.shape[0]):
            raise InvalidImage(
                f"Blend Step has {self.mask.shape[0]} masks for a batch of {like.shape[0]} latents: give one "
                "mask, or one for each."
            )
        return BlendRun(self, sigmas, like)


class BlendRun:
    """One sampling run under a :class:`Blend`: holds its noise and the mask of every step."""

    def __init__(self, blend: Blend, sigmas: Tensor, like: Tensor) -> None:
        self.blend = blend
        self.sigmas = sigmas.detach().float().cpu()
        if len(self.sigmas) < 2:
            raise InvalidSchedule(
                f"Blend Step needs at least two noise levels, and the sampler runs over {len(self.sigmas)}."
            )
        # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
        self.generator = torch.Generator().manual_seed(blend.seed)
        self.clean = blend.clean.to(like)
        self.masks = [m[:, None].to(like) for m in shrink_schedule(blend.mask, len(self.sigmas) - 1, blend.stages)]
        self.fixed_noise = self._draw(like) if blend.noise == "fixed" else None

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def restrict(self, mask: Tensor) -> None:
        """Keep more: only what ``mask`` ``[B or 1, 1, h, w]`` (1 = edit) selects as well may change."""
        self.masks = [m * mask.to(m) for m in self.masks]

    def background(self, sigma: float, like: Tensor) -> Tensor:
        """The source at noise level ``sigma``, ``[B or 1, C, h, w]``."""
        if sigma <= 0:
            return self.clean
        if isinstance(self.blend.source, Trajectory) and self.blend.noise == "trajectory":
            return self.blend.source.at(sigma).to(like)
        noise = self.fixed_noise if self.fixed_noise is not None else self._draw(like)
        return add_noise(self.clean, noise, sigma, self.blend.parametrisation)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """``x`` (a sampler's latent about to be denoised at ``sigma``) with its outside taken from the source."""
        step = step_of(self.sigmas, sigma)
        mask = self.masks[step]
        return x * mask + self._standing(step, sigma, x) * (1 - mask)

    def _standing(self, step: int, sigma: float, like: Tensor) -> Tensor:
        """The source as it stands beside a latent at ``sigma``."""
        if self.blend.level == "next" or step == 0:
            return self.background(sigma, like)
        level = float(self.sigmas[step - 1])
        noisier = self.background(level, like)
        if self.blend.parametrisation == "flow":
            return noisier
        # The reference pastes a latent of unit variance at the noisier level, which here has the scale of sigma's.
        return noisier * math.sqrt((1 + sigma**2) / (1 + level**2))

    def finish(self, x: Tensor) -> Tensor:
        """The sampler's result with its outside brought to the last noise level of the schedule, clean at 0."""
        mask = self.masks[-1]
        return x * mask + self.background(float(self.sigmas[-1]), x) * (1 - mask)
