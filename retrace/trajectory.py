"""The path of an image from its latent to noise, as an inversion walked it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import TrajectoryMismatch
from .host import Parametrisation


@dataclass(frozen=True)
class Trajectory:
    """Latents of an inverted image at every noise level, in sampling order: first the noise, last the image.

    ``sigmas`` is ``[N + 1]`` and descends to (almost) 0, ``latents`` is ``[N + 1, B, C, h, w]`` in the model's scale,
    both on the CPU; ``latents[i]`` belongs to ``sigmas[i]``. ``fingerprint`` says which model made it, ``method``
    how.
    """

    sigmas: Tensor
    latents: Tensor
    parametrisation: Parametrisation
    fingerprint: str
    method: str
    report: dict[str, float | int | str | list[float] | list[int]] = field(default_factory=dict)

    @property
    def noise(self) -> Tensor:
        """The inverted latent at the highest noise level, ``[B, C, h, w]``."""
        return self.latents[0]

    @property
    def source(self) -> Tensor:
        """The latent of the image itself, ``[B, C, h, w]``."""
        return self.latents[-1]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def at(self, sigma: float, tolerance: float = 1e-3) -> Tensor:
        """The stored latent at noise level ``sigma``; raises :class:`TrajectoryMismatch` when there is none."""
        gap = (self.sigmas - sigma).abs()
        index = int(torch.argmin(gap))
        if float(gap[index]) > tolerance * max(1.0, sigma):
            levels = ", ".join(f"{s:.3f}" for s in self.sigmas.tolist())
            raise TrajectoryMismatch(
                f"The sampler asks for noise level {sigma:.4f}, which the inversion does not hold (it has {levels}). "
                f"Sample with the sigmas of the inverter: connect its SIGMAS output, or use the same scheduler and "
                "steps."
            )
        return self.latents[index]

    def require_model(self, fingerprint: str) -> None:
        """Raise :class:`TrajectoryMismatch` unless this model made the trajectory."""
        if fingerprint != self.fingerprint:
            raise TrajectoryMismatch(
                f"This inversion was made with another model (its fingerprint is {self.fingerprint}, the connected "
                f"model's {fingerprint}). Connect the model that was used to invert, or invert again with this one."
            )
