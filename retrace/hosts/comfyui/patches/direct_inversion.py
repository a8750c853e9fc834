"""Direct Inversion under core's samplers (Ju et al. 2024, arXiv 2310.01506)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import TrajectoryMismatch
from ....core.trajectory import Trajectory
from ..calls import SamplerCall
from ..host import ComfyHost
from ..types import Model
from .run_patch import RunPatch


def patch_direct_inversion(model: Model, trajectory: Trajectory) -> Model:
    """A clone of the MODEL whose samplers put the first image of a batch back on ``trajectory`` at every step.

    The method adds to the source branch what it is off its inverted path;
    that sum is the path itself.

    Raises:
        TrajectoryMismatch: a trajectory of another kind of model, or of several images.
    """
    host = ComfyHost(model)
    trajectory.require_kind(host.parametrisation, host.latent_format)
    images = trajectory.latents.shape[1]
    if images != 1:
        raise TrajectoryMismatch(
            f"The inversion holds {images} images, but one is needed: the source of the edit. Invert one image."
        )
    patched = model.clone()
    _DirectInversionPatch(trajectory).install(patched)
    return patched


class _DirectInversionRun:
    """Puts the source on its path before every prediction, and at the end."""

    def __init__(self, trajectory: Trajectory, last: float) -> None:
        self.trajectory = trajectory
        self.last = last

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return torch.cat([self.trajectory.at(sigma).to(x), x[1:]])

    def finish(self, x: Tensor) -> Tensor:
        return self(x, self.last)


class _DirectInversionPatch(RunPatch):
    key = "retrace_direct_inversion"
    node = "Direct Inversion"
    first = True  # a local blend takes the source as it then is

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        self.trajectory = trajectory
        self.flow = trajectory.parametrisation == "flow"

    def begin(self, call: SamplerCall) -> _DirectInversionRun:
        noise: Tensor = call["noise"]
        expected = tuple(self.trajectory.noise.shape[1:])
        if tuple(noise.shape[1:]) != expected:
            raise TrajectoryMismatch(
                f"Direct Inversion holds an image with a latent of {list(expected)}, but the sampler works on "
                f"{list(noise.shape[1:])}. Sample at the size of the inverted image."
            )
        return _DirectInversionRun(self.trajectory, float(call["sigmas"][-1]))
