"""Null-text optimisation: embeddings per step that make guided sampling come back to an inverted image.

Mokady et al. 2023, "Null-text Inversion for Editing Real Images using Guided Diffusion Models" (arXiv 2211.09794),
eq. 3 and algorithm 1: walk down from the inverted noise at the guidance that edits will use, and at every step change
the unconditional embedding so that the step lands on the latent that the inversion stored (the pivot).

The default does less for the same end, see :class:`~.settings.NullTextSettings`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import InvalidSchedule, TrajectoryMismatch
from ...core.host import Conditioning, Denoiser, add_noise
from ...core.report import cost_line, memory_lines
from ...core.sampling import ddim_step, generator_of, require_finite, steps_of
from ...core.schedule import check_sigmas
from ...core.trajectory import Trajectory
from ..invert import latent_psnr
from .settings import Mode, NullTextSettings
from .steps import Optimisation, Outcome, quick_step, reference_step


@dataclass(frozen=True)
class NullTextStep:
    """A finished step, 1-based: iterations, the last loss, and PSNR from the pivot in dB; of the worst image."""

    step: int
    total: int
    iterations: int
    loss: float
    psnr: float


Callback = Callable[[NullTextStep], object]
"""Called after every step."""


@dataclass(frozen=True)
class NullText:
    """Embeddings for every step, in sampling order, and how they were found.

    ``embeddings`` is ``[N, B, T, D]`` on the CPU: number i belongs to the step from ``sigmas[i]`` to ``sigmas[i + 1]``
    and takes the place of the unconditional embedding, or of the prompt's where ``replaces`` is ``"cond"``. Sample
    with ``settings.scale`` from ``start`` ``[B, C, h, w]``, the latent at ``sigmas[0]``. ``losses[i]`` is ``[k, B]``:
    the mean squared error of every iteration that was looked at (empty for a step between equal levels), in the
    variance-preserving scale that Stable Diffusion's papers use. ``iterations`` counts the changes of each step's
    embedding. ``evaluations`` and ``backwards`` count images; ``latent_psnr`` (dB) compares the way back with the
    image, and what it cost is counted only where the way back is part of the method.
    """

    embeddings: Tensor
    sigmas: Tensor
    start: Tensor
    settings: NullTextSettings
    losses: list[Tensor] = field(repr=False)
    iterations: list[int]
    evaluations: int
    backwards: int
    latent_psnr: float
    seconds: float

    @property
    def scale(self) -> float:
        """The guidance to sample with."""
        return self.settings.scale

    @property
    def mode(self) -> Mode:
        return self.settings.mode

    @property
    def replaces(self) -> Literal["uncond", "cond"]:
        return "cond" if self.settings.changes_prompt else "uncond"

    def text(self, peak_megabytes: int | None = None) -> str:
        """What the optimisation cost and how well it returns, in lines of text."""
        steps, images = self.embeddings.shape[:2]
        average = sum(self.iterations) / steps
        final = [float(loss.amin(dim=0).max()) for loss in self.losses if len(loss)]
        lines = [
            f"{self.mode}, {steps} steps, {images} image(s), guidance {self.scale:g}",
            f"return, latent   {self.latent_psnr:6.2f} dB PSNR",
            cost_line(self.evaluations, self.backwards, self.seconds),
            f"iterations per step: {average:.1f} on average, {max(self.iterations)} at most",
            f"largest loss that a step was left with {max(final):.1e}",
        ]
        return "\n".join([*lines, *memory_lines(peak_megabytes)])


def optimise_null_text(
    model: Denoiser,
    trajectory: Trajectory,
    cond: Conditioning,
    uncond: Conditioning,
    settings: NullTextSettings | None = None,
    *,
    only_text_differs: bool = False,
    callback: Callback | None = None,
) -> NullText:
    """Find embeddings with which guided DDIM sampling retraces ``trajectory`` at the guidance of ``settings``.

    Needs a host run with ``gradients=True``. Images of a batch have embeddings of their own and do not influence each
    other: each stops at its own threshold and is kept as it is while the batch goes on to the last one. Steps between
    equal levels cost nothing and repeat the embedding before them (the reference runs its last one, which moves
    nothing).

    Args:
        model: the model that made the trajectory, or one of its kind.
        trajectory: an inversion at guidance 1.
        cond: the prompt that the inversion used, or one like it.
        uncond: what is optimised; gives everything but the token embedding to the default as well.
        settings: see :class:`~.settings.NullTextSettings`.
        only_text_differs: ``cond`` and ``uncond`` are alike but for their token embeddings (same pooled vector, same
            ControlNet ...). The default then takes the conditional estimate for both while the embedding is still that
            of the prompt, which saves an evaluation per step.
        callback: called after every step of the modes that walk.

    Raises:
        InvalidSchedule: a trajectory of one level, or of more steps than the reference's learning rate lasts.
        TrajectoryMismatch: a trajectory of another kind of model.
        RetraceError: the model answered NaN.
    """
    settings = settings or NullTextSettings()
    levels = _levels(model, trajectory, settings)
    started = time.perf_counter()
    before = model.evaluations
    pivots = trajectory.latents.to(model.device, torch.float32)
    generator = generator_of(settings.seed)
    if settings.mode == "random_pivot":
        noise = torch.randn(pivots[0].shape, generator=generator).to(pivots)
        pivots = torch.stack([add_noise(pivots[-1], noise, s, model.parametrisation) for s in levels])
    fixed, varied = (uncond, cond) if settings.changes_prompt else (cond, uncond)
    task = Optimisation(model, fixed, varied, levels, settings)
    with torch.no_grad():
        if settings.mode == "global":
            outcome = _for_all_steps(task, pivots)
        elif settings.mode in ("no_pivot", "prompt_no_pivot"):
            outcome = _without_pivots(task, pivots[-1], generator)
        else:
            outcome = _along(task, pivots, only_text_differs, callback)
        evaluations = model.evaluations - before
        back = outcome.latent if outcome.latent is not None else _back(task, pivots[0], outcome.embeddings)
    return NullText(
        torch.stack([e.detach().cpu() for e in outcome.embeddings]),
        trajectory.sigmas.clone(),
        pivots[0].cpu(),
        settings,
        [losses.cpu() for losses in outcome.losses],
        outcome.iterations,
        evaluations,
        task.backwards,
        latent_psnr(back, pivots[-1]),
        round(time.perf_counter() - started, 3),
    )


def _levels(model: Denoiser, trajectory: Trajectory, settings: NullTextSettings) -> list[float]:
    levels = [float(s) for s in check_sigmas(trajectory.sigmas).tolist()]
    if trajectory.parametrisation != model.parametrisation:
        raise TrajectoryMismatch(
            f"The trajectory was made with a model of the kind '{trajectory.parametrisation}', the connected one is of "
            f"the kind '{model.parametrisation}'. Invert again with the connected model."
        )
    if settings.schedule_steps is not None and len(levels) > 2 * settings.schedule_steps:
        raise InvalidSchedule(
            f"The inversion has {len(levels) - 1} steps, but the reference's learning rate reaches 0 at step "
            f"{2 * settings.schedule_steps}. Switch parity off, or invert with fewer steps (the reference uses 50)."
        )
    return levels


def _along(task: Optimisation, pivots: Tensor, only_text_differs: bool, callback: Callback | None) -> Outcome:
    """Step by step down the pivots, each from where the last one really arrived."""
    settings = task.settings
    start = task.fixed.embedding if settings.starts_at_prompt else None
    x, embedding = pivots[0], task.embedding(len(pivots[0]), start)
    at_prompt = settings.starts_at_prompt and only_text_differs  # then one estimate serves both conditions
    found = Outcome()
    total = len(task.levels) - 1
    for i in range(total):
        sigma, sigma_next = task.levels[i], task.levels[i + 1]
        if sigma == sigma_next:
            found.skip(embedding, len(x))
            continue
        if settings.quick:
            step = quick_step(task, i, x, pivots[i + 1], embedding, at_prompt)
            at_prompt = at_prompt and step.iterations == 0
        else:
            step = reference_step(task, i, x, pivots[i + 1], embedding)
        embedding = step.embedding
        x = ddim_step(x, step.denoised, sigma, sigma_next)
        require_finite(x, i + 1, total, sigma)
        found.add(step)
        task.model.progress(i + 1, total, step.denoised)
        if callback is not None:
            psnr = latent_psnr(x, pivots[i + 1])
            callback(NullTextStep(i + 1, total, step.iterations, float(step.losses[-1].max()), psnr))
    return replace(found, latent=x)


def _for_all_steps(task: Optimisation, pivots: Tensor) -> Outcome:
    """One embedding, changed once per step in every round; all steps start from their pivots."""
    steps = [i for i, _, _ in steps_of(task.levels)]
    fixed = {i: task.model.denoised(pivots[i], task.levels[i], task.fixed) for i in steps}
    embedding = task.embedding(len(pivots[0]))
    adam = task.adam(embedding, task.settings.learning_rate)
    losses: list[list[Tensor]] = [[] for _ in range(len(task.levels) - 1)]
    rounds = task.settings.iterations
    total = rounds * len(steps)
    for number in range(rounds):
        for done, i in enumerate(steps, 1):
            varied, loss = task.losses(i, pivots[i], fixed[i], pivots[i + 1], embedding)
            task.change(adam, embedding, loss)
            losses[i].append(loss.detach())
            task.model.progress(number * len(steps) + done, total, task.guide(varied.detach(), fixed[i]))
    return Outcome(
        [embedding.detach()] * len(losses),
        [torch.stack(k) if k else torch.zeros(0, len(pivots[0])) for k in losses],
        [len(k) for k in losses],
    )


def _without_pivots(task: Optimisation, image: Tensor, generator: torch.Generator) -> Outcome:
    """Every iteration draws noise of its own and asks for the step of that noise: the usual way to train."""
    embedding = task.embedding(len(image))
    found = Outcome()
    total = len(task.levels) - 1
    for i in range(total):
        sigma, sigma_next = task.levels[i], task.levels[i + 1]
        if sigma == sigma_next:
            found.skip(embedding, len(image))
            continue
        embedding = embedding.detach().clone()
        adam = task.adam(embedding, task.rate(i))
        losses: list[Tensor] = []
        for _ in range(task.settings.iterations):
            noise = torch.randn(image.shape, generator=generator).to(image)
            x, target = (add_noise(image, noise, s, task.model.parametrisation) for s in (sigma, sigma_next))
            fixed = task.model.denoised(x, sigma, task.fixed)
            varied, loss = task.losses(i, x, fixed, target, embedding)
            task.change(adam, embedding, loss)
            losses.append(loss.detach())
            task.model.progress(i, total)
        denoised = task.guide(varied.detach(), fixed)
        require_finite(denoised, i + 1, total, sigma)
        found.embeddings.append(embedding.detach())
        found.losses.append(torch.stack(losses))
        found.iterations.append(len(losses))
        task.model.progress(i + 1, total, denoised)
    return found


def _back(task: Optimisation, x: Tensor, embeddings: list[Tensor]) -> Tensor:
    """Sample down with the result."""
    for i, embedding in enumerate(embeddings):
        sigma, sigma_next = task.levels[i], task.levels[i + 1]
        if sigma != sigma_next:
            varied, fixed = task.both(i, x, embedding)
            x = ddim_step(x, task.guide(varied, fixed), sigma, sigma_next)
            require_finite(x, i + 1, len(embeddings), sigma)
    return x
