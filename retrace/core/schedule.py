"""Noise levels to walk: the timestep grids of the reference codes, and checks for any list of sigmas.

A grid picks timesteps from a model's training schedule; :func:`reference_sigmas` turns them into the descending noise
levels that samplers want, with ``sigma = sqrt((1 - abar) / abar)`` (so that ``x = x0 + sigma * noise``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_steps
from .errors import InvalidSchedule, Remedy

Timesteps = Callable[[int, int], list[int]]
"""``(T, steps)`` to ascending timesteps in ``0..T-1``."""


@dataclass(frozen=True)
class Grid:
    """A rule that picks timesteps, where it comes from, and where its last step goes.

    ``end`` is the level after the last timestep in the reference: ``"zero"`` or ``"first"``, the lowest training level
    (what ``set_alpha_to_one=False`` means in diffusers).
    """

    title: str
    source: str
    timesteps: Timesteps
    end: Literal["zero", "first"]


def leading(offset: int) -> Timesteps:
    """Multiples of ``T // steps`` plus ``offset`` (Lin et al. 2023, "Common diffusion noise schedules", table 2)."""
    return lambda total, steps: [i * (total // steps) + offset for i in range(steps)]


def uniform_plus_one(total: int, steps: int) -> list[int]:
    """Every ``T // steps``-th timestep plus 1, up to the top: more than ``steps`` of them when T is no multiple.

    The timesteps that would pass the last one are left out; the reference stops with an index error there.
    """
    return [t + 1 for t in range(0, total, total // steps) if t + 1 < total]


def trailing(total: int, steps: int) -> list[int]:
    """``steps`` timesteps counted down from the last one (Lin et al. 2023, table 2)."""
    stride = (total - total / steps) - total  # the float that numpy.arange steps by in diffusers: ties round as there
    return sorted(round(total + i * stride) - 1 for i in range(steps))


def respaced(total: int, sections: str) -> list[int]:
    """Timesteps of a respacing string, ascending: the rule of guided-diffusion and GLIDE.

    ``"100"`` spreads 100 timesteps from the first to the last one; ``"10,10,3"`` cuts the schedule into three equal
    sections and spreads that many in each; ``"ddim50"`` takes every n-th, for the whole n that gives exactly 50;
    ``"fast27"`` is GLIDE's upsampler schedule.

    Raises:
        InvalidSchedule: a string of another form, or more timesteps than a section holds.
    """
    if sections == "fast27":
        return [total - 3 if t == total - 1 else t for t in respaced(total, "10,10,3,2,2")]
    bare = sections.removeprefix("ddim").replace(",", "").replace(" ", "")
    if not bare.isdecimal() or (sections.startswith("ddim") and "," in sections):
        raise InvalidSchedule(
            f"respacing: got '{sections}', but counts like '100' or '10,10,3,2,2', or 'ddim50', or 'fast27' are needed."
        )
    if sections.startswith("ddim"):
        wanted = check_steps("respacing", int(bare), 1, total)
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == wanted:
                return list(range(0, total, stride))
        raise InvalidSchedule(
            f"respacing: got '{sections}', but no whole stride through {total} timesteps makes {wanted} of them. "
            f"Use a count that divides {total}, or the plain form '{wanted}'."
        )
    counts = [int(part) for part in sections.split(",") if part.strip()]
    picked: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (1 if i < total % len(counts) else 0)
        if not 1 <= count <= size:
            raise InvalidSchedule(
                f"respacing: section {i + 1} of '{sections}' asks for {count} timesteps, but 1 to {size} fit in it."
            )
        spacing = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            picked.append(start + round(position))
            position += spacing
        start += size
    return picked


GRIDS: dict[str, Grid] = {
    "leading_0": Grid(
        "Leading, offset 0 (P2P, null-text)",
        "prompt-to-prompt / null-text notebooks and blended-latent-diffusion's SD 2 script: DDIM with steps_offset 0, "
        "50 steps = 980, 960, ... 0. Its last step goes from timestep 0 to itself and changes nothing.",
        leading(0),
        "first",
    ),
    "leading_1": Grid(
        "Leading, offset 1 (diffusers SD, DragDiffusion)",
        "The scheduler configuration of Stable Diffusion in diffusers (steps_offset 1, set_alpha_to_one False), used "
        "by DragDiffusion: 50 steps = 981, 961, ... 1.",
        leading(1),
        "first",
    ),
    "uniform_plus_1": Grid(
        "Uniform + 1 (latent diffusion)",
        "CompVis latent-diffusion and Blended Latent Diffusion, 'uniform' ddim_discretize: 50 steps = 981, 961, ... 1. "
        "Equal to leading_1 where steps divides T; otherwise the reference takes further steps above.",
        uniform_plus_one,
        "first",
    ),
    "trailing": Grid(
        "Trailing",
        "Lin et al. 2023 and DDIM with timestep_spacing 'trailing': 50 steps = 999, 979, ... 19.",
        trailing,
        "zero",
    ),
    "respaced": Grid(
        "Respaced (guided-diffusion, GLIDE)",
        "openai/guided-diffusion space_timesteps with one section, as Blended Diffusion and GLIDE use it: "
        "100 steps = 999, 989, ... 10, 0.",
        lambda total, steps: respaced(total, str(steps)),
        "zero",
    ),
    "respaced_ddim": Grid(
        "Respaced, whole stride (guided-diffusion 'ddimN')",
        "openai/guided-diffusion space_timesteps 'ddimN': every n-th timestep, only for counts that come out exactly; "
        "50 steps = 980, 960, ... 0.",
        lambda total, steps: respaced(total, f"ddim{steps}"),
        "zero",
    ),
}


def grid_timesteps(name: str, total: int, steps: int) -> list[int]:
    """Descending timesteps ``0..total-1`` of the grid ``name``; arguments and errors as in :func:`grid_sigmas`."""
    return _descending(name, total, steps, _timesteps(name, total, steps)[:steps])


def reference_timesteps(name: str, total: int, steps: int) -> list[int]:
    """As :func:`grid_timesteps`, with the extra steps that ``uniform_plus_1`` has in its reference."""
    return _descending(name, total, steps, _timesteps(name, total, steps))


def grid_sigmas(name: str, training_sigmas: Tensor, steps: int) -> Tensor:
    """Noise levels ``[steps + 1]``, descending to 0, of the grid ``name`` (a key of :data:`GRIDS`).

    ``training_sigmas`` ``[T]`` are the levels of the model's training timesteps, ascending.

    Raises:
        InvalidSchedule: unknown name, fewer than 1 or more than T steps, a grid that leaves the training range, or
            training levels that are not positive, finite and ascending.
    """
    _check_training(training_sigmas)
    levels = training_sigmas[_index(grid_timesteps(name, len(training_sigmas), steps), training_sigmas)]
    return torch.cat([levels, torch.zeros_like(levels[:1])])


def reference_sigmas(name: str, training_sigmas: Tensor, steps: int) -> Tensor:
    """As :func:`grid_sigmas`, but to the letter of the reference, which does not always end at 0.

    Grids that end at the lowest training level leave a little noise (0.03 for SD) in the result; ``leading_0`` then
    repeats that level once, because its last step is from timestep 0 to itself; and ``uniform_plus_1`` has the extra
    steps of its reference.
    """
    _check_training(training_sigmas)
    levels = training_sigmas[_index(reference_timesteps(name, len(training_sigmas), steps), training_sigmas)]
    return torch.cat([levels, training_sigmas[:1] if GRIDS[name].end == "first" else torch.zeros_like(levels[:1])])


def _timesteps(name: str, total: int, steps: int) -> list[int]:
    if name not in GRIDS:
        raise InvalidSchedule(f"Timestep grid: got '{name}', but one of {', '.join(GRIDS)} is needed.")
    return GRIDS[name].timesteps(total, check_steps("steps", steps, 1, total))


def _descending(name: str, total: int, steps: int, timesteps: list[int]) -> list[int]:
    if timesteps[-1] >= total:
        raise InvalidSchedule(
            f"Timestep grid '{name}' with {steps} steps reaches timestep {timesteps[-1]}, but this model was trained "
            f"on 0..{total - 1}. Use fewer steps, or the grid 'trailing'."
        )
    return timesteps[::-1]


def _index(timesteps: list[int], like: Tensor) -> Tensor:
    return torch.tensor(timesteps, device=like.device)


def _check_training(training_sigmas: Tensor) -> None:
    if training_sigmas.ndim != 1 or len(training_sigmas) < 1:
        raise InvalidSchedule(
            f"Training sigmas: got shape {list(training_sigmas.shape)}, but a list [T] of the model's noise levels is "
            "needed."
        )
    if not bool(torch.isfinite(training_sigmas).all()):
        raise InvalidSchedule(
            "Training sigmas hold NaN or infinity. A model with zero terminal SNR ends in an infinite noise level: "
            "let the host replace that one by a large finite level."
        )
    if bool((training_sigmas <= 0).any()) or bool((training_sigmas.diff() <= 0).any()):
        raise InvalidSchedule("Training sigmas must be positive and ascending, one per training timestep.")


def check_sigmas(sigmas: object, name: str = "sigmas") -> Tensor:
    """Return ``sigmas`` when it is ``[N + 1]``, N >= 1, of finite noise levels that descend to 0 or above.

    The last level may stand twice: that is the closing no-op step of the P2P reference (:data:`GRIDS`, ``leading_0``).

    Raises:
        InvalidSchedule: another type or shape, fewer than two levels, NaN, infinity, negative or not descending levels.
    """
    needed = "a list [steps + 1] of descending noise levels"
    if not isinstance(sigmas, Tensor):
        raise InvalidSchedule(
            f"{name}: got a {type(sigmas).__name__}, but {needed} is needed. Connect a SIGMAS output."
        )
    if sigmas.ndim != 1:
        raise InvalidSchedule(f"{name}: got a tensor of shape {list(sigmas.shape)}, but {needed} is needed.")
    if len(sigmas) < 2:
        raise InvalidSchedule(
            f"{name}: got {len(sigmas)} noise level(s), i.e. no step at all, but {needed} with at least two is needed. "
            "Raise the steps, or the denoise of the scheduler that made it."
        )
    if not bool(torch.isfinite(sigmas).all()):
        raise InvalidSchedule(
            f"{name}: there is NaN or infinity among the noise levels {shown(sigmas)}. {needed} is needed."
        )
    if bool((sigmas < 0).any()):
        raise InvalidSchedule(
            f"{name}: there are negative noise levels in {shown(sigmas)}, but 0 is the lowest there is."
        )
    rises = (sigmas.diff() >= 0).nonzero().flatten().tolist()
    if rises == [len(sigmas) - 2] and bool(sigmas[-1] == sigmas[-2]) and float(sigmas[0]) > float(sigmas[-1]):
        rises = []
    if rises:
        i = rises[0]
        flip = Remedy.FLIP_SIGMAS if len(rises) == len(sigmas) - 1 else None
        raise InvalidSchedule(
            f"{name}: level {i + 2} ({float(sigmas[i + 1]):.4g}) is not below level {i + 1} ({float(sigmas[i]):.4g}), "
            f"but {needed} is needed: first the most noise, last the least.",
            flip,
        )
    return sigmas


def truncate(sigmas: Tensor, strength: float) -> Tensor:
    """The last ``round(strength * N)`` steps of ``sigmas`` ``[N + 1]``: img2img from a source that is partly noised.

    ``strength`` in (0, 1]; 1 keeps all steps, and at least one is kept. The rounding (halves to the even number) is
    that of DragDiffusion: 0.7 of 50 steps are 35, 0.75 are 38.

    Raises:
        InvalidSchedule: strength outside (0, 1], or sigmas that :func:`check_sigmas` refuses.
    """
    check_sigmas(sigmas)
    if not 0 < strength <= 1:
        raise InvalidSchedule(
            f"strength: got {strength}, but more than 0 and at most 1 is needed (1 starts from pure noise, small "
            "values stay close to the source)."
        )
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def shown(sigmas: Tensor) -> str:
    """The noise levels ``[N + 1]`` for a message, the middle ones left out where there are many."""
    values = [f"{s:.4g}" for s in sigmas.tolist()]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]])


def step_of(sigmas: Tensor, sigma: float) -> int:
    """The step of ``sigmas`` (descending ``[N + 1]``) whose interval holds ``sigma``, 0..N-1.

    Samplers of higher order also ask between the levels.
    """
    above = int((sigmas >= sigma * (1 - 1e-5)).sum())
    return min(max(above - 1, 0), len(sigmas) - 2)
