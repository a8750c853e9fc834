"""Dragging between ComfyUI's sockets: what a LATENT holds, scales, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....core.errors import InvalidSchedule, RetraceError, TrajectoryMismatch, UnsupportedModel
from ....core.host import Conditioning, FeatureDenoiser, picture_share, variance_scale
from ....core.report import memory_lines
from ....core.schedule import reference_sigmas, truncate
from ....core.trajectory import Trajectory
from ....drag.latent.edit import DragSettings, drag_points
from ....drag.latent.optimise import Dragged
from ....drag.latent.task import Callback
from ....drag.points import DragPoints
from ....inversion.invert import Method
from ..conditioning import require_one_prompt
from ..host import ComfyHost
from ..latents import below_flow_top, noisy_samples

Source = Literal["picture", "noisy"]


@dataclass(frozen=True)
class DragOutcome:
    """A drag, with the batch ``[2, C, h, w]`` of reference and edit in the scale of a LATENT socket."""

    samples: Tensor
    dragged: Dragged
    points: DragPoints
    steps: int

    def path(self) -> list[list[tuple[float, float]]]:
        """For every point where it was found, from the handle on, as (x, y) in shares of the picture."""
        high, wide = self.dragged.grid
        places = self.dragged.path.movedim(1, 0).tolist()
        return [[(column / wide, row / high) for row, column in point] for point in places]

    def path_text(self) -> str:
        """:meth:`path` as JSON, beside what was asked for."""
        entries = [
            {
                "handle": [round(v, 5) for v in pair.handle],
                "target": [round(v, 5) for v in pair.target],
                "path": [[round(x, 5), round(y, 5)] for x, y in way],
            }
            for pair, way in zip(self.points.pairs, self.path(), strict=True)
        ]
        return json.dumps({"points": entries})

    def report(self, settings: DragSettings, mask: Tensor | None, peak_megabytes: int | None = None) -> str:
        """How far every point came and what it cost, in lines of text."""
        dragged = self.dragged
        pixel = self.points.size[1] / dragged.grid[1]
        count = len(self.points.pairs)
        left = len(dragged.sigmas) - 1
        lines = [
            f"{settings.mode}, {dragged.changes} changes, {left} of {self.steps} steps left to sample",
            f"{dragged.arrived} of {count} point(s) arrived",
        ]
        shown = [f"{i}: {float(d) * pixel:.0f}" for i, d in enumerate(dragged.distances, 1)]
        lines.append("pixels to the target  " + "  ".join(shown[:12]) + (" ..." if count > 12 else ""))
        outside = [
            i for i, pair in enumerate(self.points.pairs, 1) if mask is not None and not _within(mask, pair.handle)
        ]
        if outside:
            lines.append(f"outside the mask, where nothing may change: {', '.join(map(str, outside))}")
        lines.append(
            f"{dragged.evaluations} network evaluations, {dragged.backwards} backward passes, {dragged.seconds:.1f} s"
        )
        return "\n".join([*lines, *memory_lines(peak_megabytes, dragged.recompute, settings.recompute)])


def drag_latent(
    host: ComfyHost,
    samples: Tensor | None,
    positive: Any,
    points: DragPoints,
    mask: Tensor | None,
    sigmas: Tensor,
    steps: int,
    strength: float,
    settings: DragSettings,
    *,
    source: Source = "picture",
    trajectory: Trajectory | None = None,
    negative: Any = None,
    cfg: float = 1.0,
    inversion: Method = "fixed_point",
    callback: Callback | None = None,
) -> DragOutcome:
    """Drag the picture in ``samples`` of a LATENT, or that of ``trajectory``.

    ``sigmas`` are those of the whole way, which a trajectory brings with it; ``strength`` says from where on.
    ``source`` "noisy": ``samples`` are at that level already, as 'KSampler (Advanced)' gives them with leftover noise.
    ``settings.parity`` takes the reference's noise levels for that many ``steps``, and its inversion.

    Raises:
        RetraceError: neither a latent nor a trajectory, guidance without a negative, conditions that do not hold for
            the whole picture at every level, and what the library raises.
        InvalidSchedule: a noisy latent that is not at the level where the drag begins.
        TrajectoryMismatch: a trajectory of several pictures, of another kind of model, or an edit-friendly one.
    """
    if cfg > 1 and negative is None:
        raise RetraceError(
            f"cfg is {cfg:g}, but there is no negative to guide away from. Connect one, or set cfg to 1 (the usual for "
            "photographs)."
        )
    conds = {"positive": positive} if cfg <= 1 else {"positive": positive, "negative": negative}
    for name, cond in conds.items():
        require_one_prompt(name, cond, "the features of the whole picture are looked at under it")
    if len({id(cond[0][1].get("hooks")) for cond in conds.values()}) > 1:
        raise UnsupportedModel(
            "positive and negative carry different LoRA hooks, and gradients cannot pass through both at once. Apply "
            "the LoRA to the model instead, or give both the same hooks."
        )
    if trajectory is not None:
        _check_trajectory(host, trajectory)
        sigmas = trajectory.sigmas
    elif settings.parity:
        sigmas, inversion = reference_sigmas("leading_1", host.training_sigmas(), steps, parity=True), "ddim"
    whole = len(sigmas) - 1
    sigmas = truncate(sigmas, strength)
    if trajectory is not None:
        latent = trajectory.at(float(sigmas[0]))
    elif samples is not None:
        sigmas = below_flow_top(host.parametrisation, sigmas)
        latent = host.to_model_scale(samples.float())
        if source == "noisy":
            latent = _noisy(host, latent, float(sigmas[0]))
    else:
        raise RetraceError("there is nothing to drag. Connect a LATENT from 'VAE Encode', or a trajectory.")
    already_noisy = trajectory is not None or source == "noisy"

    def method(denoiser: FeatureDenoiser, x: Tensor, conds: Mapping[str, Conditioning]) -> Dragged:
        return drag_points(
            denoiser,
            x,
            sigmas,
            conds["positive"],
            points,
            mask,
            settings,
            uncond=conds.get("negative"),
            scale=cfg,
            inversion=None if already_noisy else inversion,
            callback=callback,
        )

    dragged: Dragged = host.run(latent, conds, method, gradients=True)
    both = torch.cat([dragged.reference, dragged.edited])
    return DragOutcome(noisy_samples(host, both, float(dragged.sigmas[0])), dragged, points, whole)


def _check_trajectory(host: ComfyHost, trajectory: Trajectory) -> None:
    trajectory.require_kind(host.parametrisation, host.latent_format)
    trajectory.require_path()
    if trajectory.latents.shape[1] != 1:
        raise TrajectoryMismatch(
            f"trajectory: it holds {trajectory.latents.shape[1]} pictures, but points belong to one. Invert that one."
        )


def _noisy(host: ComfyHost, latent: Tensor, sigma: float) -> Tensor:
    """A noisy latent of core as the model sees it; refuses one that cannot be at level ``sigma``."""
    latent = latent * picture_share(sigma, host.parametrisation)  # core divides by it when a sampler stops here
    spread = float((latent / variance_scale(sigma, host.parametrisation)).std())
    if len(latent) == 1 and not 0.5 < spread < 2:
        raise InvalidSchedule(
            f"latent: it has {spread:.2f} times the spread of a latent at noise level {sigma:.3g}, where the drag "
            "begins. Stop 'KSampler (Advanced)' with leftover noise at the step that steps and strength give here, "
            "with the same scheduler; or set latent_is to 'picture'."
        )
    return latent


def _within(mask: Tensor, place: tuple[float, float]) -> bool:
    row = min(int(place[1] * mask.shape[1]), mask.shape[1] - 1)
    column = min(int(place[0] * mask.shape[2]), mask.shape[2] - 1)
    return bool(mask[0, row, column] > 0)
