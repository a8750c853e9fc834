"""CLIP guidance: words steer a sampler through the gradient of an image-text model (Avrahami et al. 2022).

``losses`` and ``views`` say what is asked of an image, ``objective`` puts it together, ``step`` turns the gradient into
a changed estimate of the clean latent, which any sampler can use.
"""

from __future__ import annotations

from .decoders import linear_decoder
from .losses import background_mse, range_loss, spherical_distance
from .objective import ClipGuidance, Look, Weights
from .step import GradientPath, GuidedRun, Move, Schedule
from .views import Augmentations, View

__all__ = [
    "Augmentations",
    "ClipGuidance",
    "GradientPath",
    "GuidedRun",
    "Look",
    "Move",
    "Schedule",
    "View",
    "Weights",
    "background_mse",
    "linear_decoder",
    "range_loss",
    "spherical_distance",
]
