"""Blended Latent Diffusion: keep everything outside a mask while a sampler works (Avrahami et al. 2023, Algorithm 1).

At every noise level the latent outside the mask is replaced by the source image at that level, so the sampler sees a
true surrounding and the edit grows into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_choice, check_latent, check_mask, check_whole
from ..core.errors import InvalidImage, InvalidInput, InvalidSchedule, Remedy
from ..core.host import Parametrisation, add_noise
from ..core.schedule import step_of
from ..core.trajectory import Trajectory
from ..masks import LatentMaskMode
from ..masks.latent import shrunk, to_grid

NoiseMode = Literal["fixed", "fresh", "trajectory"]
Level = Literal["next", "current"]
NoiseFor = Literal["each", "batch"]
Ending = Literal["source", "sampled"]
Reference = Literal["pixel", "ldm", "sd2"]


@dataclass(frozen=True)
class BlendSettings:
    """How the background is kept. The defaults are ours; :meth:`reference` has those of the authors' scripts.

    Args:
        noise: ``"fixed"`` one noise for all steps, ``"fresh"`` a new one every step (the paper), ``"trajectory"`` the
            stored latents of the inversion, which need no noise at all.
        level: at which noise level the background is when a step at sigma_i begins. ``"next"``: at sigma_i, the level
            that the foreground has. ``"current"``: at sigma_{i-1}, one step noisier, as the reference code of Blended
            Diffusion does.
        cells: what a mask in pixels becomes on the latent grid, see :func:`retrace.masks.latent_mask`.
        stages: progressive shrinking for thin masks: this many dilated masks first, the given mask last.
        seed: of the noise.
        noise_for: ``"each"`` image of a batch has its own noise, or the whole ``"batch"`` shares one.
        ending: what is outside the mask in the result: the ``"source"``, or what the last step left there
            (``"sampled"``, for those who paste or reconstruct the background themselves).

    Raises:
        InvalidSetting: a choice that does not exist, or ``stages`` below 0.
    """

    noise: NoiseMode = "fixed"
    level: Level = "next"
    cells: LatentMaskMode = "max"
    stages: int = 0
    seed: int = 0
    noise_for: NoiseFor = "each"
    ending: Ending = "source"

    def __post_init__(self) -> None:
        check_choice("noise", self.noise, get_args(NoiseMode))
        check_choice("level", self.level, get_args(Level))
        check_choice("cells", self.cells, get_args(LatentMaskMode))
        check_choice("noise_for", self.noise_for, get_args(NoiseFor))
        check_choice("ending", self.ending, get_args(Ending))
        check_whole("stages", self.stages, minimum=0)

    @classmethod
    def reference(cls, script: Reference = "ldm", stages: int = 0, seed: int = 0) -> BlendSettings:
        """What the authors' code does.

        Args:
            script: ``"pixel"`` Blended Diffusion (2022); ``"ldm"`` Blended Latent Diffusion (2023), which leaves the
                end to its background reconstruction; ``"sd2"`` the same authors' script for Stable Diffusion 2, whose
                schedule is :func:`retrace.core.schedule.reference_sigmas` ``("leading_0", ...)``. Their
                masks are 0 or 1; a soft one stays soft here.

        Raises:
            InvalidSetting: another script.
        """
        check_choice("script", script, get_args(Reference))
        return cls(
            noise="fresh",
            level="next" if script == "ldm" else "current",
            cells="nearest",
            stages=stages,
            seed=seed,
            noise_for="each" if script == "sd2" else "batch",
            ending="sampled" if script == "ldm" else "source",
        )


@dataclass(frozen=True)
class Blend:
    """What to keep and how; :meth:`start` makes the state of one sampling run. :func:`keep_source` makes one.

    ``source``: clean latent ``[B, C, h, w]`` in the model's scale, or the :class:`Trajectory` of its inversion.
    ``mask``: ``[B or 1, h, w]`` in 0..1 on the latent grid, 1 where the sampler may change; values between mix. Both
    are trusted.

    Raises:
        InvalidInput: noise ``"trajectory"`` without a trajectory.
    """

    source: Tensor | Trajectory
    mask: Tensor
    parametrisation: Parametrisation
    settings: BlendSettings = field(default_factory=BlendSettings)

    def __post_init__(self) -> None:
        if self.settings.noise == "trajectory" and not isinstance(self.source, Trajectory):
            raise InvalidInput(
                "noise: 'trajectory' takes the background from an inversion, but the source is a latent. Choose "
                "'fixed' or 'fresh', or make the inversion the source.",
                Remedy.INVERT_AGAIN,
            )

    @property
    def clean(self) -> Tensor:
        """The source without noise, ``[B, C, h, w]``."""
        return self.source.source if isinstance(self.source, Trajectory) else self.source

    def start(self, sigmas: Tensor, like: Tensor) -> BlendRun:
        """The state for one run over ``sigmas`` (descending ``[N + 1]``) of latents like ``like`` ``[B, C, h, w]``.

        Raises:
            InvalidImage: source and run differ in size or channels, or their batches do not fit.
            InvalidSchedule: fewer than two noise levels.
        """
        clean = self.clean
        if clean.shape[1:] != like.shape[1:] or clean.shape[0] not in (1, like.shape[0]):
            raise InvalidImage(
                f"Blending keeps a source latent of shape {tuple(clean.shape)}, but the sampler works on "
                f"{tuple(like.shape)}. Sample at the size of the source; its batch must be 1 or that of the sampler."
            )
        if self.mask.shape[0] not in (1, like.shape[0]):
            raise InvalidImage(
                f"Blending has {self.mask.shape[0]} masks for a batch of {like.shape[0]} latents: give one mask, or "
                "one for each."
            )
        return BlendRun(self, sigmas, like)


def keep_source(
    source: Tensor | Trajectory,
    mask: Tensor,
    parametrisation: Parametrisation,
    settings: BlendSettings | None = None,
    cell: int = 8,
) -> Blend:
    """What keeps ``source`` outside ``mask`` while a sampler works.

    Args:
        source: clean latent ``[B, C, h, w]`` in the model's scale, or the trajectory of its inversion.
        mask: ``[B or 1, H, W]`` in pixels of the image or ``[B or 1, h, w]`` on the latent grid, 1 = edit.
        parametrisation: of the model.
        cell: pixels per latent cell, ``host.downscale``.

    Raises:
        InvalidImage: a broken latent or mask, an empty mask, or a mask of another size than the image.
        InvalidInput: noise ``"trajectory"`` without a trajectory.
    """
    clean = source.source if isinstance(source, Trajectory) else check_latent("source", source)
    settings = settings or BlendSettings()
    return Blend(source, mask_on_grid(mask, clean, cell, settings.cells), parametrisation, settings)


def mask_on_grid(mask: Tensor, latent: Tensor, cell: int, mode: LatentMaskMode) -> Tensor:
    """``mask`` ``[B, H, W]`` as ``[B, h, w]`` on the grid of ``latent`` ``[B, C, h, w]``, float32 on the CPU.

    It may have the size of the latent, or that of the image; a VAE cuts the image to whole cells, as much on one side
    as on the other, and so is its mask.

    Raises:
        InvalidImage: not a mask, one of another size, or an empty one.
    """
    height, width = latent.shape[-2:]
    size = tuple(mask.shape[1:]) if isinstance(mask, Tensor) else ()
    spare = [pixels - cells * cell for pixels, cells in zip(size, (height, width), strict=False)]
    fits = size == (height, width) or all(0 <= pixels < cell for pixels in spare)
    mask = check_mask("mask", mask, None if fits else (height * cell, width * cell)).float().cpu()
    if size == (height, width):
        return mask
    top, left = (pixels // 2 for pixels in spare)
    return to_grid(mask[:, top : top + height * cell, left : left + width * cell], (height, width), mode)


class BlendRun:
    """One sampling run under a :class:`Blend`: holds its noise and the mask of every step."""

    def __init__(self, blend: Blend, sigmas: Tensor, like: Tensor) -> None:
        self.blend, self.settings = blend, blend.settings
        self.sigmas = sigmas.detach().float().cpu()
        if len(self.sigmas) < 2:
            raise InvalidSchedule(
                f"Blending needs at least two noise levels, and the sampler runs over {len(self.sigmas)}."
            )
        # Noise is drawn on the CPU, so that a seed gives the same image on every device.
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.clean = blend.clean.to(like)
        masks = shrunk(blend.mask, len(self.sigmas) - 1, self.settings.stages)
        self.masks = [mask[:, None].to(like) for mask in masks]
        self.fixed_noise = self._draw(like) if self.settings.noise == "fixed" else None

    def _draw(self, like: Tensor) -> Tensor:
        if self.settings.noise_for == "batch":
            return torch.randn((1, *like.shape[1:]), generator=self.generator).to(like).expand_as(like)
        return torch.randn(like.shape, generator=self.generator).to(like)

    def restrict(self, mask: Tensor) -> None:
        """Keep more: only what ``mask`` ``[B or 1, 1, h, w]`` (1 = edit) selects as well may change."""
        self.masks = [m * mask.to(m) for m in self.masks]

    def noisy(self, clean: Tensor, sigma: float, like: Tensor) -> Tensor:
        """``clean`` ``[B or 1, C, h, w]`` at noise level ``sigma``, with the noise of this run."""
        if sigma <= 0:
            return clean
        noise = self.fixed_noise if self.fixed_noise is not None else self._draw(like)
        return add_noise(clean, noise, sigma, self.blend.parametrisation)

    def background(self, sigma: float, like: Tensor) -> Tensor:
        """The source at noise level ``sigma``, ``[B or 1, C, h, w]``."""
        if sigma > 0 and isinstance(self.blend.source, Trajectory) and self.settings.noise == "trajectory":
            return self.blend.source.at(sigma).to(like)
        return self.noisy(self.clean, sigma, like)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """``x`` (a sampler's latent about to be denoised at ``sigma``) with its outside taken from the source."""
        step = step_of(self.sigmas, sigma)
        mask = self.masks[step]
        return x * mask + self._standing(step, sigma, x) * (1 - mask)

    def _standing(self, step: int, sigma: float, like: Tensor) -> Tensor:
        """The source as it stands beside a latent at ``sigma``."""
        if self.settings.level == "next" or step == 0:
            return self.background(sigma, like)
        level = float(self.sigmas[step - 1])
        return self.beside(self.background(level, like), level, sigma)

    def beside(self, noisier: Tensor, level: float, sigma: float) -> Tensor:
        """A latent at noise level ``level`` as the reference pastes it beside one at the lower level ``sigma``."""
        if self.blend.parametrisation == "flow":
            return noisier
        # The reference pastes a latent of unit variance at the noisier level, which here has the scale of sigma's.
        return noisier * math.sqrt((1 + sigma**2) / (1 + level**2))

    def finish(self, x: Tensor) -> Tensor:
        """The sampler's result with its outside brought to the last noise level of the schedule, clean at 0.

        With the ending ``"sampled"`` it is ``x`` itself.
        """
        if self.settings.ending == "sampled":
            return x
        mask = self.masks[-1]
        return x * mask + self.background(float(self.sigmas[-1]), x) * (1 - mask)
