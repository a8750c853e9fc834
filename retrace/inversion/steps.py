"""One step of an inversion, solved in three ways; :mod:`.invert` tells them apart and walks the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..core.host import Conditioning, Denoiser, variance_scale

ANDERSON_DEPTH = 3
STALL = 3  # iterations without a tenth of improvement after which a sample is as good as it gets
LEARNING_RATE = 1e-3  # of SPDInv's AdamW


@dataclass
class SolvedStep:
    """One solved step: latent, clean estimate, direction (all ``[B, C, h, w]``) and how well g was met."""

    x: Tensor
    denoised: Tensor
    direction: Tensor
    iterations: int = 1
    residual: float | None = None
    backwards: int = 0


@dataclass(frozen=True)
class Problem:
    """One step up to solve: from ``x_low`` at level ``low`` to level ``high``."""

    model: Denoiser
    cond: Conditioning
    x_low: Tensor
    low: float
    high: float
    tick: Callable[[], None]

    def g(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) and D(x): one evaluation at the high level."""
        denoised = self.model.denoised(x, self.high, self.cond)
        return self.x_low + (x - denoised) * (1 - self.low / self.high), denoised

    def residuals(self, x: Tensor, mapped: Tensor) -> Tensor:
        """By how much sampling from x misses x_low, relative to x_low, ``[B]``."""
        relative: Tensor = (mapped - x).flatten(1).norm(dim=1) / self.x_low.flatten(1).norm(dim=1).clamp(min=1e-12)
        return relative

    def solved(self, x: Tensor, mapped: Tensor, denoised: Tensor, iterations: int) -> SolvedStep:
        direction = (mapped - self.x_low) / (self.high - self.low)
        return SolvedStep(x, denoised, direction, iterations, float(self.residuals(x, mapped).max()))


def ddim(problem: Problem) -> SolvedStep:
    """The direction at the low latent, taken for one at the high level; one evaluation."""
    kind = problem.model.parametrisation
    scale = variance_scale(problem.high, kind) / variance_scale(problem.low, kind)
    mapped, denoised = problem.g(problem.x_low * scale)
    return replace(problem.solved(mapped, mapped, denoised, 1), residual=None)


class _Anderson:
    """Anderson acceleration of one sample (type II; Walker & Ni 2011, section 2): the next point from the last few."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.mapped: list[Tensor] = []
        self.errors: list[Tensor] = []

    @property
    def active(self) -> bool:
        """Whether the last proposal was an accelerated one."""
        return len(self.mapped) > 1

    def restart(self) -> None:
        self.mapped, self.errors = [], []

    def next(self, x: Tensor, mapped: Tensor) -> Tensor:
        self.mapped = [*self.mapped, mapped.flatten()][-self.depth - 1 :]
        self.errors = [*self.errors, (mapped - x).flatten()][-self.depth - 1 :]
        if len(self.mapped) == 1:
            return mapped
        d_error = torch.stack([b - a for a, b in pairwise(self.errors)])
        if float(d_error.norm()) <= 100 * torch.finfo(x.dtype).eps * float(mapped.norm()):
            return mapped  # the error does not change but for rounding: nothing to learn from
        d_mapped = torch.stack([b - a for a, b in pairwise(self.mapped)])
        gram = (d_error @ d_error.T).cpu().double()
        right = (d_error @ self.errors[-1]).cpu().double()
        ridge = 1e-10 * gram.diagonal().sum().clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype)
        weights: Tensor = torch.linalg.solve(gram + ridge, right).to(d_mapped)
        return (mapped.flatten() - weights @ d_mapped).view_as(mapped)


def predict(last: SolvedStep | None, below: tuple[float, Tensor] | None, low: float, high: float) -> Tensor | None:
    """The direction at ``high``, drawn on in a line from the two levels below: costs nothing, saves an iteration."""
    if last is None or below is None:
        return None if last is None else last.direction
    level, direction = below
    return last.direction + (last.direction - direction) * ((high - low) / (low - level))


def fixed_point(problem: Problem, guess: Tensor | None, tolerance: float, max_iterations: int) -> SolvedStep:
    """Iterate g with Anderson acceleration from ``guess``, a direction (None: start at the low latent)."""
    x_low = problem.x_low
    x = x_low.clone() if guess is None else x_low + guess * (problem.high - problem.low)
    batch = len(x_low)
    best_x, best_mapped, best_denoised = x.clone(), x.clone(), x.clone()
    best = [math.inf] * batch
    stalled, failures = [0] * batch, [0] * batch
    accelerate = [_Anderson(ANDERSON_DEPTH) for _ in range(batch)]
    active = set(range(batch))
    iterations = 0
    while active and iterations < max_iterations:
        mapped, denoised = problem.g(x)
        iterations += 1
        residuals = problem.residuals(x, mapped).tolist()
        x = x.clone()
        for b in sorted(active):
            residual = residuals[b]
            stalled[b] = 0 if residual < 0.9 * best[b] else stalled[b] + 1
            # A plain step may overshoot: acceleration learns from that. After an accelerated one it is divergence.
            diverges = not math.isfinite(residual) or (residual > 2 * best[b] and accelerate[b].active)
            if residual < best[b]:
                best[b] = residual
                best_x[b], best_mapped[b], best_denoised[b] = x[b], mapped[b], denoised[b]
            if best[b] <= tolerance or stalled[b] >= STALL or (diverges and best[b] == math.inf):
                active.discard(b)
                x[b] = best_x[b]
            elif diverges:
                failures[b] += 1
                accelerate[b].restart()
                x[b] = torch.lerp(best_x[b], best_mapped[b], 0.5 ** failures[b])
            else:
                x[b] = accelerate[b].next(x[b], mapped[b])
        if active:
            problem.tick()
    step = problem.solved(best_x, best_mapped, best_denoised, iterations)
    if math.inf in best:  # not one finite answer: let the caller's check of the latent report it
        step.x = torch.full_like(best_x, math.nan)
    return step


def spdinv(problem: Problem, threshold: float, max_iterations: int) -> SolvedStep:
    """Descend on the squared residual of g with AdamW, started from :func:`ddim`."""
    start = ddim(problem)
    model = problem.model
    scale = variance_scale(problem.high, model.parametrisation)
    best = torch.full((len(start.x),), math.inf, device=start.x.device, dtype=start.x.dtype)
    best_x, best_mapped, best_denoised = start.x.clone(), start.x.clone(), start.denoised.clone()
    finished = torch.zeros_like(best, dtype=torch.bool)
    # Adam does not mind a constant factor, but the gradient of a mean over thousands of values is nothing in fp16.
    loss_scale: Tensor | None = None
    iterations = 0
    with model.differentiable():
        z = (start.x / scale).detach().requires_grad_(True)
        optimizer = torch.optim.AdamW([z], lr=LEARNING_RATE)
        while True:
            x = z * scale
            mapped, denoised = problem.g(x)
            errors = ((mapped - x) / scale).flatten(1)
            found = errors.detach().pow(2).mean(dim=1)
            better = (found < best) & ~finished
            best = torch.where(better, found, best)
            pick = better.view(-1, 1, 1, 1)
            best_x = torch.where(pick, x.detach(), best_x)
            best_mapped = torch.where(pick, mapped.detach(), best_mapped)
            best_denoised = torch.where(pick, denoised.detach(), best_denoised)
            finished = finished | (found < threshold) | ~torch.isfinite(found)
            iterations += 1
            if iterations == max_iterations or bool(finished.all()):
                break
            if loss_scale is None:
                loss_scale = errors.detach().norm(dim=1).clamp(min=1e-12).reciprocal()
            # The samples do not share parameters, so the gradient of the sum is each sample's own.
            (z.grad,) = torch.autograd.grad((errors.pow(2).sum(dim=1) * loss_scale).sum(), [z])
            optimizer.step()
            problem.tick()
    if not bool(torch.isfinite(best).all()):
        best_x = torch.full_like(best_x, math.nan)
    return replace(problem.solved(best_x, best_mapped, best_denoised, iterations), backwards=iterations - 1)
