"""Latents between LATENT sockets and methods: scales, and the noise that core's samplers start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.host import Parametrisation, from_variance_preserving, picture_share
from ...core.trajectory import Trajectory

if TYPE_CHECKING:
    from .host import ComfyHost

# Core starts a flow model at (1 - sigma) * latent: nothing would be left of the inverted noise at sigma 1.
FLOW_TOP = 0.9999


def below_flow_top(parametrisation: Parametrisation, sigmas: Tensor) -> Tensor:
    """``sigmas`` with :data:`FLOW_TOP` for a top level above it, for flow models."""
    if parametrisation != "flow" or float(sigmas[0]) <= FLOW_TOP:
        return sigmas
    return torch.cat([sigmas.new_tensor([FLOW_TOP]), sigmas[sigmas < FLOW_TOP]])


def clean_latent(host: ComfyHost, samples: Tensor, sigmas: Tensor) -> Tensor:
    """The ``samples`` of a LATENT in the model's scale, as what an inversion along ``sigmas`` begins with.

    Grids that end at the lowest training level, as the papers' code does, mean a latent of unit variance there.
    """
    x0 = host.to_model_scale(samples.float())
    last, lowest = float(sigmas[-1]), float(host.training_sigmas()[0])
    ends_there = last > 0 and abs(last - lowest) <= 1e-4 * lowest
    return from_variance_preserving(x0, last, host.parametrisation) if ends_there else x0


def noise_samples(host: ComfyHost, trajectory: Trajectory) -> Tensor:
    """The inverted noise as ``samples`` of a LATENT, for core's samplers with their own noise switched off."""
    return noisy_samples(host, trajectory.noise, float(trajectory.sigmas[0]))


def noisy_samples(host: ComfyHost, latent: Tensor, sigma: float) -> Tensor:
    """A latent at level ``sigma`` as ``samples`` that core's samplers go on with, their own noise switched off."""
    # Core scales what a flow model starts from by its share of the image at that level.
    return host.from_model_scale(latent / picture_share(sigma, host.parametrisation))
