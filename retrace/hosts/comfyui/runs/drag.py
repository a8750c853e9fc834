"""Dragging between ComfyUI's sockets: what a LATENT holds, and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.checks import check_latent
from ....core.errors import InvalidInput, InvalidSchedule, TrajectoryMismatch, UnsupportedModel
from ....core.host import Conditioning, FeatureDenoiser, picture_share, variance_scale
from ....core.schedule import reference_sigmas, truncate
from ....core.trajectory import Trajectory
from ....drag.latent.edit import drag_points
from ....drag.latent.result import Dragged
from ....drag.latent.settings import DragSettings
from ....drag.latent.task import Callback, DragSource
from ....drag.points import DragPoints
from ..conditioning import require_one_prompt
from ..host import ComfyHost
from ..latents import below_flow_top, noisy_samples
from ..types import ConditioningList


@dataclass(frozen=True)
class Start:
    """Where a drag begins: a latent ``[1, C, h, w]`` in the model's scale and the noise levels from there on.

    ``noisy``: the latent is at ``sigmas[0]`` already. ``steps``: of the whole way from noise.
    """

    latent: Tensor
    sigmas: Tensor
    steps: int
    noisy: bool = True

    @classmethod
    def of_image(cls, host: ComfyHost, samples: object, sigmas: Tensor, strength: float) -> Start:
        """The image in the ``samples`` of a LATENT, to be inverted to where ``strength`` says on the way ``sigmas``.

        Raises:
            InvalidImage: not a latent of this model.
        """
        latent = host.to_model_scale(check_latent("latent", samples, host.latent_channels).float())
        left = below_flow_top(host.parametrisation, truncate(sigmas, strength))
        return cls(latent, left, len(sigmas) - 1, noisy=False)

    @classmethod
    def of_noisy(cls, host: ComfyHost, samples: object, sigmas: Tensor, strength: float) -> Start:
        """An image that is still being generated, as 'KSampler (Advanced)' gives it with leftover noise.

        Raises:
            InvalidImage: not a latent of this model.
            InvalidSchedule: it cannot be at the level where ``strength`` says that the drag begins.
        """
        clean = cls.of_image(host, samples, sigmas, strength)
        sigma = float(clean.sigmas[0])
        latent = clean.latent * picture_share(sigma, host.parametrisation)  # core divides by it when a sampler stops
        spread = float((latent / variance_scale(sigma, host.parametrisation)).std())
        if len(latent) == 1 and not 0.5 < spread < 2:
            raise InvalidSchedule(
                f"latent: it has {spread:.2f} times the spread of a latent at noise level {sigma:.3g}, where the drag "
                "begins. Stop 'KSampler (Advanced)' with leftover noise at the step that steps and strength give here, "
                "with the same scheduler; or set latent_is to 'picture'."
            )
        return cls(latent, clean.sigmas, clean.steps)

    @classmethod
    def of_trajectory(cls, host: ComfyHost, trajectory: Trajectory, strength: float) -> Start:
        """An inversion, at the level where ``strength`` says on its own way.

        Raises:
            TrajectoryMismatch: of several images, of another kind of model, or an edit-friendly one.
        """
        trajectory.require_kind(host.parametrisation, host.latent_format)
        trajectory.require_path()
        if trajectory.latents.shape[1] != 1:
            raise TrajectoryMismatch(
                f"trajectory: it holds {trajectory.latents.shape[1]} images, but points belong to one. Invert that one."
            )
        left = truncate(trajectory.sigmas, strength)
        return cls(trajectory.at(float(left[0])), left, len(trajectory.sigmas) - 1)


@dataclass(frozen=True)
class Words:
    """The CONDITIONING of a drag; the negative and ``cfg`` are those that a generated image was made with.

    Raises:
        InvalidInput: guidance without a negative, conditions that do not hold for the whole image at every level.
        UnsupportedModel: different LoRA hooks.
    """

    positive: ConditioningList
    negative: ConditioningList | None = None
    cfg: float = 1.0

    def __post_init__(self) -> None:
        if self.cfg > 1 and self.negative is None:
            raise InvalidInput(
                f"cfg is {self.cfg:g}, but there is no negative to guide away from. Connect one, or set cfg to 1 (the "
                "usual for photographs)."
            )
        conds = self.conds
        for name, cond in conds.items():
            require_one_prompt(name, cond, "the features of the whole image are looked at under it")
        if len({id(cond[0][1].get("hooks")) for cond in conds.values()}) > 1:
            raise UnsupportedModel(
                "positive and negative carry different LoRA hooks, and gradients cannot pass through both at once. "
                "Apply the LoRA to the model instead, or give both the same hooks."
            )

    @property
    def conds(self) -> dict[str, ConditioningList]:
        """What the model is asked under, by name."""
        if self.cfg <= 1 or self.negative is None:
            return {"positive": self.positive}
        return {"positive": self.positive, "negative": self.negative}


@dataclass(frozen=True)
class DragOutcome:
    """A drag, with the batch ``[2, C, h, w]`` of reference and edit in the scale of a LATENT socket."""

    samples: Tensor
    dragged: Dragged


def reference_levels(host: ComfyHost, steps: int) -> Tensor:
    """The noise levels ``[steps + 1]`` of the authors' code."""
    return reference_sigmas("leading_1", host.training_sigmas(), steps)


def drag_latent(
    host: ComfyHost,
    start: Start,
    words: Words,
    points: DragPoints,
    mask: Tensor | None,
    settings: DragSettings,
    callback: Callback | None = None,
) -> DragOutcome:
    """Drag from ``start`` under ``words``; see :func:`retrace.drag.latent.edit.drag_points`."""

    def method(denoiser: FeatureDenoiser, x: Tensor, conds: Mapping[str, Conditioning]) -> Dragged:
        source = DragSource(
            latent=x,
            sigmas=start.sigmas,
            cond=conds["positive"],
            noisy=start.noisy,
            uncond=conds.get("negative"),
            scale=words.cfg,
            steps=start.steps,
        )
        return drag_points(denoiser, source, points, mask, settings, callback)

    dragged = host.run(start.latent, words.conds, method, gradients=True)
    both = torch.cat([dragged.reference, dragged.edited])
    return DragOutcome(noisy_samples(host, both, float(dragged.sigmas[0])), dragged)
