"""What arrives on a socket may be anything; these say what it should have been."""

from __future__ import annotations

from ..retrace.core.checks import describe
from ..retrace.core.errors import InvalidImage, InvalidInput, InvalidPoints, Remedy
from ..retrace.core.trajectory import Trajectory
from ..retrace.drag.points import DragPoints


def require_trajectory(value: object) -> Trajectory:
    """The trajectory on a RETRACE_TRAJECTORY socket; raises InvalidInput for anything else."""
    if not isinstance(value, Trajectory):
        raise InvalidInput(f"trajectory: got {describe(value)}, but an inversion is needed.", Remedy.INVERT_AGAIN)
    return value


def require_points(value: object) -> DragPoints:
    """The points on a RETRACE_POINTS socket; raises InvalidPoints for anything else."""
    if not isinstance(value, DragPoints):
        raise InvalidPoints(f"points: got {describe(value)}, but points are needed. Connect 'Drag Points'.")
    return value


def latent_samples(value: object, connect: str = "VAE Encode") -> object:
    """What a LATENT socket holds as ``samples``, unchecked; raises InvalidImage, which names the node to connect."""
    if not isinstance(value, dict) or "samples" not in value:
        raise InvalidImage(f"latent: got {describe(value)}, but a LATENT is needed. Connect '{connect}'.")
    return value["samples"]
