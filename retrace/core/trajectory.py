"""The path of an image from its latent to noise, as an inversion walked it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import Remedy, TrajectoryMismatch
from .host import Parametrisation
from .report import cost_line


@dataclass(frozen=True)
class Trajectory:
    """Latents of an inverted image at every noise level, in sampling order: first the noise, last the image.

    ``sigmas`` is ``[N + 1]`` and descends to (almost) 0, ``latents`` is ``[N + 1, B, C, h, w]`` in the model's scale,
    both on the CPU; ``latents[i]`` belongs to ``sigmas[i]``. ``fingerprint`` says which model made it, ``method``
    how, ``latent_format`` (:attr:`Host.latent_format`, empty when not known) what the numbers of a latent mean.
    """

    sigmas: Tensor
    latents: Tensor
    parametrisation: Parametrisation
    fingerprint: str
    method: str
    report: dict[str, float | int | str | list[float] | list[int]] = field(default_factory=dict)
    latent_format: str = ""

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

    def fact(self, name: str) -> float:
        """A number of the report; 0 where it holds none of that name."""
        value = self.report.get(name)
        return value if isinstance(value, int | float) else 0.0

    def cost(self) -> str:
        """What the inversion took, in one line."""
        return cost_line(int(self.fact("evaluations")), int(self.fact("backwards")), self.fact("seconds"))

    def at(self, sigma: float) -> Tensor:
        """The latent at noise level ``sigma``, ``[B, C, h, w]``.

        Between two stored levels, where samplers of higher order also ask, it is interpolated linearly in sigma: the
        path from one to the next is one Euler step, a straight line. Raises :class:`TrajectoryMismatch` above the
        highest and below the lowest level.
        """
        levels = self.sigmas.tolist()
        top, bottom = levels[0], levels[-1]
        if not bottom * (1 - 1e-3) - 1e-6 <= sigma <= top * (1 + 1e-3):
            raise TrajectoryMismatch(
                f"The sampler asks for noise level {sigma:.4f}, but the inversion reaches from {top:.4f} down to "
                f"{bottom:.4f}. Sample with the sigmas of the inverter: connect its SIGMAS output, or use the same "
                "scheduler and no more denoise than it inverted."
            )
        sigma = min(max(sigma, bottom), top)
        upper = max(i for i, level in enumerate(levels) if level >= sigma)
        if upper == len(levels) - 1 or levels[upper] == sigma:
            return self.latents[upper]
        share = (sigma - levels[upper + 1]) / (levels[upper] - levels[upper + 1])
        return torch.lerp(self.latents[upper + 1], self.latents[upper], share)

    def require_model(self, fingerprint: str) -> None:
        """Raise :class:`TrajectoryMismatch` unless this model made the trajectory."""
        if fingerprint != self.fingerprint:
            raise TrajectoryMismatch(
                f"This inversion was made with another model (its fingerprint is {self.fingerprint}, the connected "
                f"model's {fingerprint}). Connect the model that was used to invert, or invert again with this one."
            )

    def require_path(self) -> None:
        """Raise :class:`TrajectoryMismatch` where the latents are not points of one path that a sampler could walk."""
        if self.method == "edit_friendly":
            raise TrajectoryMismatch(
                "trajectory: it comes from an edit-friendly inversion, whose latents are not points of one path that a "
                "sampler could walk, down or back, and such a path is needed.",
                Remedy.INVERT_AGAIN,
            )

    def require_kind(self, parametrisation: Parametrisation, latent_format: str) -> None:
        """Raise :class:`TrajectoryMismatch` unless latents of such a model mean the same.

        Weaker than :meth:`require_model`: the same picture may be edited with a fine-tune or a LoRA.
        """
        mine, other = (self.parametrisation, self.latent_format), (parametrisation, latent_format)
        if mine[0] != other[0] or (mine[1] and other[1] and mine[1] != other[1]):
            raise TrajectoryMismatch(
                f"This inversion holds latents of another kind of model ({' '.join(mine)}; the connected model has "
                f"{' '.join(other)}). Invert the image with the connected model, or with one of its family."
            )
