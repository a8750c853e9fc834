"""Null-text optimisation: embeddings per step that make guided sampling come back to an inverted image.

Mokady et al. 2023, "Null-text Inversion for Editing Real Images using Guided Diffusion Models" (arXiv 2211.09794),
eq. 3 and algorithm 1: walk down from the inverted noise at the guidance that edits will use, and at every step change
the unconditional embedding so that the step lands on the latent that the inversion stored (the pivot).

The default does less for the same end. It can start at the embedding of the prompt itself, where guidance does nothing
(negative-prompt inversion, Miyake et al. 2023), asks for the conditional estimate once per step, and looks at the loss
before it pays for a backward pass, so that the prediction that meets the threshold is also the one that advances.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.checks import check_steps
from ...core.errors import InvalidSchedule, RetraceError, TrajectoryMismatch
from ...core.host import Conditioning, Denoiser, add_noise
from ...core.sampling import ddim_step, require_finite
from ...core.schedule import check_sigmas
from ...core.trajectory import Trajectory
from ..invert import latent_psnr
from .steps import Optimisation, Outcome, Settings, quick_step, reference_step

Mode = Literal["pivotal", "global", "random_pivot", "no_pivot", "prompt", "prompt_no_pivot"]
MODES: tuple[Mode, ...] = ("pivotal", "global", "random_pivot", "no_pivot", "prompt", "prompt_no_pivot")
Start = Literal["cond", "uncond"]
PROMPT_MODES: frozenset[Mode] = frozenset({"prompt", "prompt_no_pivot"})
"""Modes that change the embedding of the prompt and leave the unconditional one alone."""

Callback = Callable[[int, int, int, float, float], None]
"""``callback(step, total, iterations, loss, psnr)`` after every step: losses and PSNR in dB of the worst image."""


@dataclass(frozen=True)
class NullText:
    """Embeddings for every step, in sampling order, and how they were found.

    ``embeddings`` is ``[N, B, T, D]`` on the CPU: number i belongs to the step from ``sigmas[i]`` to ``sigmas[i + 1]``
    and takes the place of the unconditional embedding, or of the prompt's where ``replaces`` is ``"cond"``. Sample
    with ``scale`` from ``start`` ``[B, C, h, w]``, the latent at ``sigmas[0]``. ``losses[i]`` is ``[k, B]``: the mean
    squared error of every iteration that was looked at (empty for a step between equal levels), in the
    variance-preserving scale that Stable Diffusion's papers use. ``iterations`` counts the changes of each step's
    embedding. ``evaluations`` and ``backwards`` count images; ``latent_psnr`` (dB) compares the way back with the
    image, and what it cost is counted only where the way back is part of the method.
    """

    embeddings: Tensor
    sigmas: Tensor
    start: Tensor
    scale: float
    mode: Mode
    losses: list[Tensor] = field(repr=False)
    iterations: list[int]
    evaluations: int
    backwards: int
    latent_psnr: float
    seconds: float

    @property
    def replaces(self) -> Literal["uncond", "cond"]:
        return "cond" if self.mode in PROMPT_MODES else "uncond"


def optimise_null_text(
    model: Denoiser,
    trajectory: Trajectory,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float = 7.5,
    *,
    mode: Mode = "pivotal",
    parity: bool = False,
    inner_steps: int = 10,
    learning_rate: float = 1e-2,
    early_stop: float = 1e-5,
    seed: int = 0,
    start: Start = "cond",
    only_text_differs: bool = False,
    callback: Callback | None = None,
) -> NullText:
    """Find embeddings with which guided DDIM sampling retraces ``trajectory`` at guidance ``scale``.

    Needs a host run with ``gradients=True``. Images of a batch have embeddings of their own and do not influence each
    other: each stops at its own threshold and is kept as it is while the batch goes on to the last one.

    ``pivotal`` is the method. Step i of N has the learning rate ``learning_rate * (1 - i / 2N)`` and is finished when
    its loss is below ``early_stop + 2e-5 * 50 i / N`` (never, where ``early_stop`` is 0), or after ``inner_steps``
    changes; for 50 steps that is the reference's schedule. With ``parity`` it is the reference's to the letter: it
    begins at ``uncond``, has ``1 - i / 100`` and ``2e-5 i`` for any N, looks at the loss after each change, and
    evaluates both conditions again to advance. That makes 3 + k evaluations for a step of k changes; the default makes
    2 + k, or 1 where ``only_text_differs`` and the prompt's embedding is good enough. Steps between equal levels cost
    nothing and repeat the embedding before them (the reference runs its last one, which moves nothing, too).

    The others are the paper's ablations, always with the reference's schedule where they have one: ``global`` one
    embedding for all steps, trained in ``inner_steps`` rounds over the pivots; ``random_pivot`` pivots on the straight
    line from the image to one random noise; ``no_pivot`` fresh noise in every iteration; ``prompt`` and
    ``prompt_no_pivot`` as ``pivotal`` and ``no_pivot``, but changing the prompt's embedding.

    Args:
        cond: the prompt that the inversion used, or one like it.
        uncond: what is optimised; gives everything but the token embedding to the default as well.
        seed: of the noise of ``random_pivot``, ``no_pivot`` and ``prompt_no_pivot``.
        start: the embedding that the default of ``pivotal`` begins with. At ``cond``'s there is little to change. From
            ``uncond``'s, where the paper begins, it takes about five times the evaluations, and the way back is as
            good; but the result stays near an empty prompt, so guidance pushes a later edit less far away from all that
            the source shows. All else begins at what it changes.
        only_text_differs: ``cond`` and ``uncond`` are alike but for their token embeddings (same pooled vector, same
            ControlNet ...). The default then takes the conditional estimate for both while the embedding is still that
            of the prompt, which saves an evaluation per step.

    Raises:
        InvalidSchedule: a trajectory of one level, or of more than 99 steps with ``parity``.
        TrajectoryMismatch: a trajectory of another kind of model.
        RetraceError: a setting out of its range, a guidance at which the embedding has no influence, or NaN.
    """
    levels = _check(model, trajectory, scale, mode, start, parity, inner_steps, learning_rate, early_stop)
    started = time.perf_counter()
    before = model.evaluations
    pivots = trajectory.latents.to(model.device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    if mode == "random_pivot":
        noise = torch.randn(pivots[0].shape, generator=generator).to(pivots)
        pivots = torch.stack([add_noise(pivots[-1], noise, s, model.parametrisation) for s in levels])
    task = Optimisation(
        model=model,
        fixed=uncond if mode in PROMPT_MODES else cond,
        varied=cond if mode in PROMPT_MODES else uncond,
        levels=levels,
        scale=float(scale),
        null=mode not in PROMPT_MODES,
        settings=Settings(inner_steps, learning_rate, early_stop, parity),
    )
    quick = not parity and mode == "pivotal"
    with torch.no_grad():
        if mode == "global":
            outcome = _for_all_steps(task, pivots)
        elif mode in ("no_pivot", "prompt_no_pivot"):
            outcome = _without_pivots(task, pivots[-1], generator)
        else:
            warm = quick and start == "cond"
            outcome = _along(
                task, pivots, cond.embedding if warm else None, warm and only_text_differs, quick, callback
            )
        evaluations = model.evaluations - before
        back = outcome.latent if outcome.latent is not None else _back(task, pivots[0], outcome.embeddings)
    return NullText(
        torch.stack([e.detach().cpu() for e in outcome.embeddings]),
        trajectory.sigmas.clone(),
        pivots[0].cpu(),
        float(scale),
        mode,
        [losses.cpu() for losses in outcome.losses],
        outcome.iterations,
        evaluations,
        task.backwards,
        latent_psnr(back, pivots[-1]),
        round(time.perf_counter() - started, 3),
    )


def _check(
    model: Denoiser,
    trajectory: Trajectory,
    scale: float,
    mode: str,
    start: str,
    parity: bool,
    inner_steps: int,
    learning_rate: float,
    early_stop: float,
) -> list[float]:
    levels = [float(s) for s in check_sigmas(trajectory.sigmas).tolist()]
    if trajectory.parametrisation != model.parametrisation:
        raise TrajectoryMismatch(
            f"The trajectory was made with a model of the kind '{trajectory.parametrisation}', the connected one is of "
            f"the kind '{model.parametrisation}'. Invert again with the connected model."
        )
    if mode not in MODES:
        raise RetraceError(f"Null-text mode: got '{mode}', but one of {', '.join(MODES)} is needed.")
    if start not in get_args(Start):
        raise RetraceError(f"start: got '{start}', but one of {', '.join(get_args(Start))} is needed.")
    # Without influence on the guided estimate an embedding cannot be optimised.
    useless = 0.0 if mode in PROMPT_MODES else 1.0
    if not math.isfinite(scale) or scale == useless:
        raise RetraceError(
            f"Guidance: got {scale}, at which the embedding that mode '{mode}' optimises has no influence. Give the "
            "guidance that the edits will use, for example 7.5."
        )
    check_steps("inner_steps", inner_steps, 1)
    if not 0 < learning_rate < math.inf:
        raise RetraceError(f"learning_rate: got {learning_rate}, but a number above 0 is needed (try 0.01).")
    if not 0 <= early_stop < math.inf:
        raise RetraceError(f"early_stop: got {early_stop}, but a loss of 0 or more is needed (try 1e-5).")
    if parity and len(levels) > 100:
        raise InvalidSchedule(
            f"The inversion has {len(levels) - 1} steps, but the reference's learning rate reaches 0 at step 100. "
            "Switch parity off, or invert with fewer steps (the reference uses 50)."
        )
    return levels


def _along(
    task: Optimisation, pivots: Tensor, warm: Tensor | None, free: bool, quick: bool, callback: Callback | None
) -> Outcome:
    """Step by step down the pivots, each from where the last one really arrived."""
    x, embedding = pivots[0], task.embedding(len(pivots[0]), warm)
    found = Outcome()
    total = len(task.levels) - 1
    for i in range(total):
        sigma, sigma_next = task.levels[i], task.levels[i + 1]
        if sigma == sigma_next:
            found.skip(embedding, len(x))
            continue
        if quick:
            step = quick_step(task, i, x, pivots[i + 1], embedding, free)
            free = free and step.iterations == 0
        else:
            step = reference_step(task, i, x, pivots[i + 1], embedding)
        embedding = step.embedding
        x = ddim_step(x, step.denoised, sigma, sigma_next)
        require_finite(x, i + 1, total, sigma)
        found.add(step)
        task.model.progress(i + 1, total, step.denoised)
        if callback is not None:
            callback(i + 1, total, step.iterations, float(step.losses[-1].max()), latent_psnr(x, pivots[i + 1]))
    return replace(found, latent=x)


def _for_all_steps(task: Optimisation, pivots: Tensor) -> Outcome:
    """One embedding, changed once per step in every round; all steps start from their pivots."""
    steps = [i for i in range(len(task.levels) - 1) if task.levels[i] != task.levels[i + 1]]
    fixed = {i: task.model.denoised(pivots[i], task.levels[i], task.fixed) for i in steps}
    embedding = task.embedding(len(pivots[0]))
    adam = task.adam(embedding, task.settings.learning_rate)
    losses: list[list[Tensor]] = [[] for _ in range(len(task.levels) - 1)]
    rounds = task.settings.inner_steps
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
        for _ in range(task.settings.inner_steps):
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
