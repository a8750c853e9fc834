"""One step of null-text optimisation: as the reference takes it, and as :mod:`.optimise` does by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.host import Conditioning, Denoiser, guided, variance_scale
from ...core.sampling import ddim_step, require_finite
from .settings import REFERENCE_STEPS, NullTextSettings

THRESHOLD_GROWTH = 2e-5  # by which the reference's early-stop threshold grows per step of 50
# Half-precision networks would round the gradient of a mean to 0. A power of two changes no digit of it.
GRADIENT_SCALE = 2.0**14


@dataclass
class OptimisedStep:
    """One finished step: the embedding ``[B, T, D]``, the guided estimate that advances, the losses ``[k, B]``."""

    embedding: Tensor
    denoised: Tensor
    losses: Tensor
    iterations: int


@dataclass
class Outcome:
    """What all steps gave, in sampling order; ``latent`` is where they led, if they were walked."""

    embeddings: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    latent: Tensor | None = None

    def add(self, step: OptimisedStep) -> None:
        self.embeddings.append(step.embedding)
        self.losses.append(step.losses)
        self.iterations.append(step.iterations)

    def skip(self, embedding: Tensor, batch: int) -> None:
        """A step between equal levels, where no embedding makes a difference."""
        self.embeddings.append(embedding.detach())
        self.losses.append(torch.zeros(0, batch))
        self.iterations.append(0)


@dataclass
class Optimisation:
    """The problem of all steps: ``varied`` changes its embedding, ``fixed`` does not."""

    model: Denoiser
    fixed: Conditioning
    varied: Conditioning
    levels: list[float]
    settings: NullTextSettings
    backwards: int = 0

    def embedding(self, batch: int, start: Tensor | None = None) -> Tensor:
        """An embedding per image ``[B, T, D]`` to begin with, in 32-bit: that of ``varied``, or ``start``."""
        source = self.varied.embedding if start is None else start
        return source.detach().to(self.model.device, torch.float32).expand(batch, -1, -1).clone()

    def guide(self, varied: Tensor, fixed: Tensor) -> Tensor:
        uncond, cond = (fixed, varied) if self.settings.changes_prompt else (varied, fixed)
        return guided(uncond, cond, self.settings.scale)

    def both(self, i: int, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The varied and the fixed estimate at step i, in one batch where the host can."""
        pair = [self.varied.with_embedding(embedding), self.fixed]
        varied, fixed = self.model.denoised_each(x, self.levels[i], pair)
        return varied, fixed

    def error(self, i: int, x: Tensor, denoised: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance ``[B]`` of the step from its target.

        In DDPM's scale (z = x / sqrt(1 + sigma^2)) for eps and v models, so that thresholds mean what they mean there.
        """
        sigma_next = self.levels[i + 1]
        scale = variance_scale(sigma_next, self.model.parametrisation)
        step = ddim_step(x, denoised, self.levels[i], sigma_next)
        return ((step - target) / scale).flatten(1).pow(2).mean(dim=1)

    def losses(self, i: int, x: Tensor, fixed: Tensor, target: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The varied estimate for ``embedding`` and its losses ``[B]``, both with a graph that leads to it."""
        with self.model.differentiable():
            embedding.requires_grad_(True)
            varied = self.model.denoised(x, self.levels[i], self.varied.with_embedding(embedding))
            return varied, self.error(i, x, self.guide(varied, fixed), target)

    @property
    def schedule_steps(self) -> int:
        """How many steps the learning rate and the threshold are spread over."""
        return self.settings.schedule_steps or len(self.levels) - 1

    def rate(self, i: int) -> float:
        return self.settings.learning_rate * (1 - i / (2 * self.schedule_steps))

    def threshold(self, i: int) -> float:
        if self.settings.early_stop == 0:
            return 0.0
        return self.settings.early_stop + THRESHOLD_GROWTH * i * REFERENCE_STEPS / self.schedule_steps

    def adam(self, embedding: Tensor, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam([embedding], lr=rate)

    def change(self, adam: torch.optim.Adam, embedding: Tensor, losses: Tensor, active: Tensor | None = None) -> None:
        """One backward pass and one step of Adam, for the images that are ``active`` ``[B]``."""
        # No image has a share in another one's embedding, so the gradient of the sum is each one's own.
        (gradient,) = torch.autograd.grad(losses, [embedding], torch.full_like(losses, GRADIENT_SCALE))
        self.backwards += len(losses)
        embedding.grad = gradient / GRADIENT_SCALE
        held = embedding.detach().clone()
        adam.step()
        if active is not None:
            with torch.no_grad():
                embedding.copy_(torch.where(active.view(-1, 1, 1), embedding, held))


def reference_step(task: Optimisation, i: int, x: Tensor, target: Tensor, start: Tensor) -> OptimisedStep:
    """As in the authors' notebook: change, then look at the loss from before the change; then evaluate both again."""
    fixed = task.model.denoised(x, task.levels[i], task.fixed)
    embedding = start.detach().clone()
    adam = task.adam(embedding, task.rate(i))
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    history: list[Tensor] = []
    for _ in range(task.settings.iterations):
        _, losses = task.losses(i, x, fixed, target, embedding)
        task.change(adam, embedding, losses, active)
        history.append(losses.detach())
        active = active & ~(history[-1] < task.threshold(i))
        if not bool(active.any()):
            break
        task.model.progress(i, len(task.levels) - 1)
    embedding = embedding.detach()
    varied, fixed = task.both(i, x, embedding)
    return OptimisedStep(embedding, task.guide(varied, fixed), torch.stack(history), len(history))


def quick_step(task: Optimisation, i: int, x: Tensor, target: Tensor, start: Tensor, at_prompt: bool) -> OptimisedStep:
    """Look before each change, keep the best embedding of each image, and advance with the estimate it gave.

    ``at_prompt``: the conditional estimate is also that of ``start``.
    """
    fixed = task.model.denoised(x, task.levels[i], task.fixed)
    threshold = task.threshold(i)
    best = torch.full((len(x),), math.inf, device=x.device)
    best_embedding, best_varied = start.detach(), fixed
    history: list[Tensor] = []
    if at_prompt:
        best = task.error(i, x, fixed, target)
        if bool((best < threshold).all()):
            return OptimisedStep(best_embedding, fixed, best[None], 0)
    embedding = start.detach().clone()
    adam = task.adam(embedding, task.rate(i))
    changes = 0
    while True:
        varied, losses = task.losses(i, x, fixed, target, embedding)
        found = losses.detach()
        better = (found < best).view(-1, 1, 1)
        best_embedding = torch.where(better, embedding.detach(), best_embedding)
        best_varied = torch.where(better.view(-1, 1, 1, 1), varied.detach(), best_varied)
        best = torch.minimum(best, found)
        history.append(found)
        # The one thing the host waits for. To look one iteration later would cost a backward pass in every step that
        # needs no change at all, which is most of them.
        active = ~(best < threshold)
        if changes == task.settings.iterations or not bool(active.any()):
            break
        task.change(adam, embedding, losses, active)
        changes += 1
        task.model.progress(i, len(task.levels) - 1)
    require_finite(best, i + 1, len(task.levels) - 1, task.levels[i])  # a NaN once seen stays the minimum
    return OptimisedStep(best_embedding, task.guide(best_varied, fixed), torch.stack(history), changes)
