"""Null-text optimisation between ComfyUI's sockets: its embeddings come out as plain CONDITIONING, one entry per step.

Every entry is active from halfway to the step before it until halfway to the step after it, so core picks the right one
by itself. Sampled with other noise levels it would pick wrong ones, or the average of two; against that the entries
carry a hook (core's own mechanism for conditions that bring code with them) that looks at every evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.hooks
import comfy.model_base
import comfy.patcher_extension
import torch
from torch import Tensor

from ....core.errors import InvalidInput, InvalidSchedule, Remedy, TrajectoryMismatch
from ....core.host import Conditioning, Denoiser
from ....core.trajectory import Trajectory
from ....inversion.null_text.optimise import Callback, NullText, optimise_null_text
from ....inversion.null_text.settings import NullTextSettings
from ..calls import EvaluationCall
from ..conditioning import part_of_steps, require_conditioning
from ..host import ComfyHost
from ..latents import noisy_samples
from ..types import ConditioningList, Executor, ModelSampling, Options

_KEY = "retrace_null_text"
_TOLERANCE = 1e-3  # of the noise level; a step is farther from the next one than that


@dataclass(frozen=True)
class Optimised:
    """Conditions to sample with, the noise to begin with (scale of a LATENT socket), and how it went."""

    positive: ConditioningList
    negative: ConditioningList
    noise: Tensor
    result: NullText


def optimise(
    host: ComfyHost,
    trajectory: Trajectory,
    positive: ConditioningList,
    negative: ConditioningList,
    settings: NullTextSettings,
    callback: Callback | None = None,
) -> Optimised:
    """Optimise for two CONDITIONING lists; see :func:`.optimise_null_text`.

    The list whose embedding is optimised must have one entry; everything in it but the embedding is kept.

    Raises:
        TrajectoryMismatch: the trajectory was made with another model.
        InvalidInput: that list has several entries or a time range.
        RetraceError: what the library raises.
    """
    trajectory.require_model(host.fingerprint())
    trajectory.require_path()
    prompt = settings.changes_prompt
    _one_entry("positive" if prompt else "negative", positive if prompt else negative)
    require_conditioning("negative" if prompt else "positive", negative if prompt else positive)
    alike = _only_text_differs(host, positive, negative)

    def method(denoiser: Denoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> NullText:
        return optimise_null_text(
            denoiser,
            trajectory,
            conds["positive"],
            conds["negative"],
            settings,
            only_text_differs=alike,
            callback=callback,
        )

    conds = {"positive": positive, "negative": negative}
    result = host.run(trajectory.noise, conds, method, gradients=True)
    given = positive if prompt else negative
    timed = conditioning_per_step(host.model_sampling, result.sigmas, result.embeddings, given)
    # Modes with pivots of their own start at another noise than the inversion's.
    noise = noisy_samples(host, result.start, float(result.sigmas[0]))
    return Optimised(timed if prompt else positive, negative if prompt else timed, noise, result)


def conditioning_per_step(
    model_sampling: ModelSampling, sigmas: Tensor, embeddings: Tensor, given: ConditioningList
) -> ConditioningList:
    """The CONDITIONING ``given`` once per step, with ``embeddings`` ``[N, B, T, D]`` for ``sigmas`` ``[N + 1]``.

    Steps that start at the same level share an entry. Raises :class:`InvalidSchedule` where two levels
    are too close for core to keep them apart.
    """
    _, options = given[0]
    steps: dict[float, Tensor] = {}
    for sigma, embedding in zip(sigmas[:-1].tolist(), embeddings, strict=True):
        steps.setdefault(float(sigma), embedding)
    levels = list(steps)
    hooks = comfy.hooks.HookGroup()
    hooks.add(ScheduleGuard())
    hooks = comfy.hooks.HookGroup.combine_all_hooks([group for group in (options.get("hooks"), hooks) if group])
    entries: ConditioningList = []
    for sigma, (start, end) in zip(levels, step_ranges(model_sampling, levels), strict=True):
        step = StepOf(sigma, tuple(levels), len(embeddings[0]))
        timed = {**options, "start_percent": start, "end_percent": end, "hooks": hooks, _KEY: step}
        entries.append([steps[sigma].clone(), timed])
    return entries


def to_tensors(conditioning: object) -> dict[str, Tensor]:
    """What :func:`from_tensors` makes an optimised CONDITIONING of again, for a file.

    Raises :class:`InvalidInput` for one that no optimiser made, or that carries more than numbers.
    """
    given = require_conditioning("negative", conditioning)
    entries = [entry for entry in given if _KEY in entry[1]]
    if len(entries) != len(given):
        raise InvalidInput(
            "negative: this CONDITIONING was not optimised. Connect the 'negative' of a 'Null-text Optimizer', or "
            "nothing: plain words need no file."
        )
    kept = {
        "embeddings": torch.stack([embedding.float().cpu() for embedding, _ in entries]),
        "levels": torch.tensor([options[_KEY].sigma for _, options in entries]),
    }
    for name, value in entries[0][1].items():
        if name in ("start_percent", "end_percent", "hooks", _KEY) or value is None:
            continue
        if not isinstance(value, Tensor | int | float):
            raise InvalidInput(
                f"negative: this CONDITIONING carries '{name}' ({type(value).__name__}), which a file cannot hold. "
                "Connect the 'negative' of the 'Null-text Optimizer' itself."
            )
        kept[f"option.{name}"] = value.cpu() if isinstance(value, Tensor) else torch.tensor(value)
    return kept


def from_tensors(host: ComfyHost, tensors: Mapping[str, Tensor]) -> ConditioningList:
    """The CONDITIONING that :func:`to_tensors` took apart, one entry per step, for the model of ``host``."""
    options: dict[str, Any] = {
        name.removeprefix("option."): value if value.ndim else value.item()
        for name, value in tensors.items()
        if name.startswith("option.")
    }
    sigmas = torch.cat([tensors["levels"], torch.zeros(1)])
    return conditioning_per_step(host.model_sampling, sigmas, tensors["embeddings"], [[None, options]])


def step_ranges(model_sampling: ModelSampling, levels: list[float]) -> list[tuple[float, float]]:
    """``(start_percent, end_percent)`` for every one of the descending ``levels``, cut between neighbours.

    Core turns percents into noise levels by the model's own rule, which is inverted here by bisection, so that it holds
    for every kind of model.
    """
    cuts = [0.0]
    for high, low in pairwise(levels):
        middle = (high * low) ** 0.5
        below, above = 0.0, 1.0  # percents; the level falls as they rise
        for _ in range(60):
            percent = (below + above) / 2
            if float(model_sampling.percent_to_sigma(percent)) > middle:
                below = percent
            else:
                above = percent
        if not low < float(model_sampling.percent_to_sigma(above)) < high:
            raise InvalidSchedule(
                f"The noise levels {high:.6g} and {low:.6g} lie too close together, or too far outside what this model "
                "was trained on, for ComfyUI to give each its own condition. Invert with fewer steps or with another "
                "scheduler, for example ddim_uniform."
            )
        cuts.append(above)
    return list(zip(cuts, [*cuts[1:], 1.0], strict=True))


@dataclass(frozen=True)
class StepOf:
    """What an entry was made for: the noise level of its step, all levels, and how many images."""

    sigma: float
    levels: tuple[float, ...]
    images: int


class ScheduleGuard(comfy.hooks.TransformerOptionsHook):
    """Comes with the conditions and refuses to evaluate them where they were not made for.

    It adds a wrapper to the run and does not register itself. Core then drops it from the conditions, which therefore
    still share a batch with others; a registered hook would have them evaluated apart.
    """

    def __init__(self) -> None:
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        super().__init__({"wrappers": {kind: {_KEY: [_refuse_other_levels]}}})

    def add_hook_patches(self, model: Any, model_options: Options, target_dict: Any, registered: Any) -> bool:
        """Called by core at the start of a run."""
        wrappers = model_options["transformer_options"].setdefault("wrappers", {})
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        wrappers.setdefault(kind, {})[_KEY] = [_refuse_other_levels]  # once, however many conditions bring it
        return False


def _refuse_other_levels(executor: Executor, *args: Any, **kwargs: Any) -> Any:
    """Around every evaluation of all conditions."""
    call = EvaluationCall(args, kwargs)
    sigma = None
    for cond in call["conds"]:
        ours = [entry for entry in cond or () if _KEY in entry]
        if ours:
            sigma = float(torch.as_tensor(call["timestep"]).max()) if sigma is None else sigma
            if len(ours) < len(cond):
                raise InvalidInput(
                    "Null-text Optimizer: an area or a mask of the other conditioning needs a negative of its own, and "
                    "the optimised one holds for the whole image. Take 'Conditioning (Set Area)', 'Set Mask' or "
                    "'Combine' out of the sampler's positive."
                )
            _check_step(ours, sigma, int(call["x_in"].shape[0]))
    return executor(*args, **kwargs)


def _check_step(entries: list[Options], sigma: float, images: int) -> None:
    active: list[StepOf] = [
        entry[_KEY]
        for entry in entries
        if sigma <= float(entry.get("timestep_start", sigma)) and sigma >= float(entry.get("timestep_end", sigma))
    ]
    made: StepOf = entries[0][_KEY]
    if len(active) != 1 or abs(active[0].sigma - sigma) > _TOLERANCE * active[0].sigma:
        levels = ", ".join(f"{level:.3f}" for level in made.levels)
        raise TrajectoryMismatch(
            f"Null-text Optimizer: the sampler asks for noise level {sigma:.4f}, but the optimised conditioning was "
            f"made for {levels}. Use the sampler euler or ddim with the inversion's SIGMAS (or with its scheduler and "
            "steps, and denoise 1), and set no other time range on this conditioning."
        )
    if images % made.images:
        raise TrajectoryMismatch(
            f"Null-text Optimizer: the sampler works on {images} image(s), but the conditioning was optimised for "
            f"{made.images}, each with its own embeddings. Sample the latents that it was made for."
        )


def _one_entry(name: str, value: object) -> None:
    entries = require_conditioning(name, value)
    if len(entries) != 1:
        raise InvalidInput(
            f"{name}: got {len(entries)} prompts in one CONDITIONING (from 'Conditioning Combine', areas, or an "
            "earlier null-text optimisation), but exactly one can be optimised.",
            Remedy.CONNECT_PROMPT,
        )
    part = part_of_steps(entries[0][1])
    if part:
        raise InvalidInput(
            f"{name}: this CONDITIONING holds for a part of the steps only ({part[0]:g} to {part[1]:g}), but the "
            "optimiser cuts it by steps itself. Connect it without a time range."
        )


def _only_text_differs(host: ComfyHost, positive: ConditioningList, negative: ConditioningList) -> bool:
    """Whether the two conditions would be one and the same with the same token embeddings."""
    if len(positive) != 1 or len(negative) != 1:
        return False
    kind, base = type(host.model.model), comfy.model_base.BaseModel
    pooled_is_unused = kind.encode_adm is base.encode_adm and kind.extra_conds is base.extra_conds
    ignored = {"pooled_output"} if pooled_is_unused else set()
    one, other = ({k: v for k, v in entry[0][1].items() if k not in ignored} for entry in (positive, negative))
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (bool, int, float, str, type(None))):
        return bool(a == b)
    return a is b
