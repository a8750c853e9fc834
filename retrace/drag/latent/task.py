"""What every way of dragging works on: one noisy latent, looked at through a block of the network, changed by Adam."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.errors import InvalidSetting, Remedy, RetraceError, UnsupportedModel
from ...core.host import Conditioning, FeatureDenoiser, guided, variance_scale
from ...core.sampling import ddim_step
from ..points import DragPoints
from .motion import FeatureGrid
from .settings import DragSettings

GRADIENT_SCALE = 1024.0  # keeps small gradients of networks in half precision from vanishing; a power of two: exact
MOST_OVERFLOWS = 4

Callback = Callable[[int, int, list[float]], None]
"""``(change, at most, distances)`` after each change; how far every point was from its target when last looked for, in
fractions of the image's width."""


@dataclass(frozen=True)
class DragSource:
    """What is dragged, from which noise level on, and what describes it.

    Args:
        latent: ``[1, C, h, w]`` of an image; with ``noisy`` one that is at ``sigmas[0]`` already: of a trajectory, or
            of an image that is still being generated.
        sigmas: ``[N + 1]``, the noise levels from that of the drag down to where sampling ends.
        cond: what describes the image.
        noisy: see ``latent``.
        uncond: with ``scale`` above 1 the guidance that a generated image was made with; inverted ones are dragged
            without.
        scale: see ``uncond``.
        steps: how many steps the whole way from noise has, for the report; None: those of ``sigmas``.
    """

    latent: Tensor
    sigmas: Tensor
    cond: Conditioning
    noisy: bool = False
    uncond: Conditioning | None = None
    scale: float = 1.0
    steps: int | None = None

    @property
    def conds(self) -> list[Conditioning]:
        """The conditions that the network is asked under: the negative first, where there is guidance."""
        return [self.cond] if self.uncond is None or self.scale <= 1 else [self.uncond, self.cond]


@dataclass(frozen=True)
class Look:
    """One evaluation of the network, at least up to the feature block."""

    features: FeatureGrid


@dataclass(frozen=True)
class WholeLook(Look):
    """One of the whole network: also the latent one DDIM step ``below``, of unit variance, and the clean estimate."""

    below: Tensor
    denoised: Tensor


@dataclass
class Trace:
    """What happened on the way: where the points were found, the loss of every change, the backward passes.

    ``evaluations`` is where the model's count stood at the beginning.
    """

    evaluations: int = 0
    started: float = field(default_factory=time.perf_counter)
    path: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    backwards: int = 0


@dataclass(frozen=True)
class DragTask:
    """A drag worked out: what was asked for, and where on which grid the points and the mask lie.

    Latents in here are of unit variance, ``z = x / sqrt(1 + sigma^2)``, the scale in which the papers' learning rates
    and weights are meant; flow models keep theirs.

    Args:
        mask: ``[1, H, W]`` as it arrived, None where everything may change.
        handles: ``[P, 2]`` (row, column) on the ``grid``, as are the ``targets``.
        block: whose features are looked at.
        area: ``[1, 1, h, w]``, 1 in the cells that may change.
        cut: nothing is asked of the network beyond the block, because there is nothing to punish.
        recompute: see :meth:`Denoiser.differentiable`.
    """

    model: FeatureDenoiser
    source: DragSource
    points: DragPoints
    mask: Tensor | None
    settings: DragSettings
    handles: Tensor
    targets: Tensor
    grid: tuple[int, int]
    block: str
    area: Tensor
    cut: bool = False
    recompute: bool = False
    callback: Callback | None = None

    def unit(self, x: Tensor, sigma: float) -> Tensor:
        return x / variance_scale(sigma, self.model.parametrisation)

    def noisy(self, z: Tensor, sigma: float) -> Tensor:
        return z * variance_scale(sigma, self.model.parametrisation)

    def look(self, z: Tensor, sigma: float, sigma_next: float) -> Look:
        """Features of ``z`` at level ``sigma``; a :class:`WholeLook` unless the network is cut."""
        if not self.cut:
            return self.whole_look(z, sigma, sigma_next)
        x = self.noisy(z, sigma)
        maps = [self.model.features_of(x, sigma, cond, self.block) for cond in self.source.conds]
        return Look(self._grid(torch.cat(maps)))

    def whole_look(self, z: Tensor, sigma: float, sigma_next: float) -> WholeLook:
        """The same through the whole network, cut or not."""
        x = self.noisy(z, sigma)
        with self.model.features([self.block]) as kept:
            estimates = self.model.denoised_each(x, sigma, self.source.conds)
        denoised = estimates[0] if len(estimates) == 1 else guided(estimates[0], estimates[1], self.source.scale)
        below = self.unit(ddim_step(x, denoised, sigma, sigma_next), sigma_next)
        return WholeLook(self._grid(kept[self.block].float()), below, denoised)

    def _grid(self, maps: Tensor) -> FeatureGrid:
        """The features of both conditions, weighted as the reference does, where there is guidance."""
        if len(maps) == 2:
            share = self.source.scale / (2 * self.source.scale - 1)
            maps = torch.cat([(1 - share) * maps[:1], share * maps[1:]], dim=1)
        return FeatureGrid(maps[0], *self.grid)

    def templates(self, features: FeatureGrid) -> Tensor:
        """The features ``[P, C]`` at the first handles."""
        return features.at(self.handles).detach()

    def background(self, look: Look, anchor: Tensor | None) -> Tensor | float:
        """How far the next lower latent has left ``anchor`` outside the mask: the sum of absolute differences."""
        if anchor is None or not isinstance(look, WholeLook):
            return 0.0
        return ((look.below - anchor) * (1 - self.area)).abs().sum()

    def report(self, change: int, most: int, handles: Tensor, denoised: Tensor | None) -> None:
        """Tell the callback and the host that ``change`` of ``most`` is done; raises what stops the run."""
        if self.callback is not None:
            self.callback(change, most, ((self.targets - handles).norm(dim=1) / self.grid[1]).tolist())
        self.model.progress(change, most, None if denoised is None else denoised.detach())


class Changes:
    """Adam on one latent, with the gradient scaled against underflow and the outside put back where it must stay."""

    def __init__(self, task: DragTask, trace: Trace, z: Tensor, learning_rate: float) -> None:
        self.task, self.trace = task, trace
        self.held = z.detach().clone()
        self.z = z.detach().clone().requires_grad_()
        self._adam = torch.optim.Adam([self.z], lr=learning_rate)
        self._scale = GRADIENT_SCALE
        self._overflows = 0

    def apply(self, loss: Tensor) -> bool:
        """One backward pass and one step; whether there was one.

        A gradient that overflows is left out, and the next one scaled less.

        Raises:
            RetraceError: it keeps overflowing.
        """
        (gradient,) = torch.autograd.grad(loss * self._scale, [self.z])
        self.trace.backwards += 1
        if not bool(torch.isfinite(gradient).all()):
            self._scale /= 16
            self._overflows += 1
            if self._overflows > MOST_OVERFLOWS:
                raise RetraceError(
                    "The gradient of the drag is NaN or infinite. Run the model in 32-bit or bf16 (fp16 overflows in "
                    "some models), or check that the latent and the words belong to this model."
                )
            return False
        self._overflows = 0
        self.trace.losses.append(float(loss.detach()))
        self.z.grad = gradient / self._scale
        self._adam.step()
        if self.task.settings.hard_mask:
            with torch.no_grad():
                self.z.copy_(torch.lerp(self.held, self.z, self.task.area))
        return True


def choose_block(model: FeatureDenoiser, block: str) -> str:
    """The feature block: ``"auto"`` is the last but one of the decoder, the paper's choice (``up.2`` of SD 1.5).

    Raises:
        UnsupportedModel: the model has no such blocks, not being a UNet.
        InvalidSetting: a block that it does not have.
    """
    if len(model.blocks) < 2:
        raise UnsupportedModel(
            "Dragging needs the feature maps of a UNet (SD 1.x, SD 2.x, SDXL); this model has none.",
            Remedy.WARP_INSTEAD,
        )
    if block == "auto":
        return model.blocks[-2]
    if block not in model.blocks:
        raise InvalidSetting(f"feature block: got '{block}', but this model has {', '.join(model.blocks)}.")
    return block
