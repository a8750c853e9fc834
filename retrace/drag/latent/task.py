"""What every way of dragging works on: one noisy latent, looked at through a block of the network, changed by Adam."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.errors import InvalidImage, RetraceError, UnsupportedModel
from ...core.host import Conditioning, FeatureDenoiser, guided, variance_scale
from ...core.sampling import ddim_step
from .motion import FeatureGrid

GRADIENT_SCALE = 1024.0  # keeps small gradients of networks in half precision from vanishing; a power of two: exact
MOST_OVERFLOWS = 4

Callback = Callable[[int, int, list[float]], None]
"""``(change, at most, distances)`` after each change; how far every point was from its target when last looked for, in
shares of the picture's width."""


@dataclass(frozen=True)
class Look:
    """One evaluation of the network. ``below`` and ``denoised`` are missing where it was cut after the block."""

    features: FeatureGrid
    below: Tensor | None = None
    denoised: Tensor | None = None


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
    """One latent ``[1, C, h, w]``, its points on a grid, and what of it may change.

    Latents in here are of unit variance, ``z = x / sqrt(1 + sigma^2)``, the scale in which the papers' learning rates
    and weights are meant; flow models keep theirs.

    ``mask`` ``[1, 1, h, w]`` is 1 where the latent may change. Soft: what is outside may change but the change of the
    next lower latent is punished, as in the papers. ``hard_mask``: it stays exactly, as in DragFlow. ``cut``: nothing
    is asked of the network beyond the block, because there is nothing to punish. ``uncond`` and ``scale``: guidance of
    a generated picture, whose features are those of both conditions, weighted as the reference does. ``recompute``: see
    :meth:`Denoiser.differentiable`.
    """

    model: FeatureDenoiser
    cond: Conditioning
    handles: Tensor
    targets: Tensor
    grid: tuple[int, int]
    block: str
    mask: Tensor
    hard_mask: bool = False
    cut: bool = False
    uncond: Conditioning | None = None
    scale: float = 1.0
    recompute: bool = False
    callback: Callback | None = None

    def unit(self, x: Tensor, sigma: float) -> Tensor:
        return x / variance_scale(sigma, self.model.parametrisation)

    def noisy(self, z: Tensor, sigma: float) -> Tensor:
        return z * variance_scale(sigma, self.model.parametrisation)

    def look(self, z: Tensor, sigma: float, sigma_next: float, *, whole: bool = False) -> Look:
        """Features of ``z`` at level ``sigma``; unless cut, also the latent one DDIM step below and the clean one."""
        x = self.noisy(z, sigma)
        conds = [self.cond] if self.uncond is None else [self.uncond, self.cond]
        if self.cut and not whole:
            maps = [self.model.features_of(x, sigma, cond, self.block) for cond in conds]
            return Look(self._grid(torch.cat(maps)))
        with self.model.features([self.block]) as kept:
            estimates = self.model.denoised_each(x, sigma, conds)
        denoised = estimates[0] if len(conds) == 1 else guided(estimates[0], estimates[1], self.scale)
        below = self.unit(ddim_step(x, denoised, sigma, sigma_next), sigma_next)
        return Look(self._grid(kept[self.block].float()), below, denoised)

    def _grid(self, maps: Tensor) -> FeatureGrid:
        if len(maps) == 2:
            share = self.scale / (2 * self.scale - 1)
            maps = torch.cat([(1 - share) * maps[:1], share * maps[1:]], dim=1)
        return FeatureGrid(maps[0], *self.grid)

    def templates(self, features: FeatureGrid) -> Tensor:
        """The features ``[P, C]`` at the first handles."""
        return features.at(self.handles).detach()

    def background(self, look: Look, anchor: Tensor | None) -> Tensor | float:
        """How far the next lower latent has left ``anchor`` outside the mask: the sum of absolute differences."""
        if look.below is None or anchor is None:
            return 0.0
        return ((look.below - anchor) * (1 - self.mask)).abs().sum()

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
        if self.task.hard_mask:
            with torch.no_grad():
                self.z.copy_(torch.lerp(self.held, self.z, self.task.mask))
        return True


def choose_block(model: FeatureDenoiser, block: str) -> str:
    """The feature block: ``"auto"`` is the last but one of the decoder, the paper's choice (``up.2`` of SD 1.5).

    Raises:
        UnsupportedModel: the model has no such blocks, being no UNet.
        RetraceError: a block that it does not have.
    """
    if len(model.blocks) < 2:
        raise UnsupportedModel(
            "Dragging needs the feature maps of a UNet (SD 1.x, SD 2.x, SDXL); the connected model has none. Connect "
            "one of these, or use 'Warp and Inpaint', which works with every model."
        )
    if block == "auto":
        return model.blocks[-2]
    if block not in model.blocks:
        raise RetraceError(f"feature_block: got '{block}', but this model has {', '.join(model.blocks)}.")
    return block


def check_single(x: Tensor) -> None:
    """Raise :class:`InvalidImage` unless ``x`` is the latent of one picture, and not an empty one."""
    if not bool(torch.count_nonzero(x)):
        raise InvalidImage("latent: it is empty. Connect the picture that shall be dragged, from 'VAE Encode'.")
    if len(x) != 1:
        raise InvalidImage(
            f"latent: got a batch of {len(x)} pictures, but points belong to one. Take it out with 'Latent From Batch'."
        )
