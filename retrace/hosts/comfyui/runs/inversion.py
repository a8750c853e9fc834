"""Inversion between LATENT sockets: scales, the way back for the report, noise that core's samplers start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.host import Conditioning, Denoiser, Parametrisation, picture_share
from ....core.sampling import sample_ddim
from ....core.trajectory import Trajectory
from ....inversion.invert import Method, invert, latent_psnr
from ....metrics import psnr
from ..cost import memory_lines
from ..host import ComfyHost

# Core starts a flow model at (1 - sigma) * latent: nothing would be left of the inverted noise at sigma 1.
FLOW_TOP = 0.9999


@dataclass(frozen=True)
class Inverted:
    """An inversion, with its noise in the scale of a LATENT socket, and the scores of sampling back (dB)."""

    trajectory: Trajectory
    noise: Tensor
    latent_psnr: float | None = None
    image_psnr: float | None = None

    def report(self, peak_megabytes: int | None = None) -> str:
        """What the inversion cost and how well it returns, in lines of text."""
        facts = self.trajectory.report
        lines = [
            f"{self.trajectory.method}, {self.trajectory.steps} steps, {self.trajectory.latents.shape[1]} image(s)"
        ]
        if self.latent_psnr is not None:
            lines.append(f"return, latent   {self.latent_psnr:6.2f} dB PSNR")
        if self.image_psnr is not None:
            lines.append(f"return, picture  {self.image_psnr:6.2f} dB PSNR (vs VAE)")
        backwards = f", {facts['backwards']} backward passes" if facts.get("backwards") else ""
        lines.append(f"{facts['evaluations']} network evaluations{backwards}, {facts['seconds']:.1f} s")
        residuals = facts.get("residuals")
        if isinstance(residuals, list) and residuals:
            lines.append(f"largest residual of a step {max(residuals):.1e}")
        return "\n".join([*lines, *memory_lines(peak_megabytes)])


def invert_latent(
    host: ComfyHost,
    samples: Tensor,
    sigmas: Tensor,
    positive: Any,
    method: Method,
    *,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    verify: bool = True,
) -> Inverted:
    """Invert the ``samples`` of a LATENT under the CONDITIONING ``positive``; see :func:`.invert.invert`.

    ``verify`` samples back once; the score of the picture needs a host with a VAE. Flow models whose walk would end at
    sigma 1 end at :data:`FLOW_TOP` instead.
    """
    sigmas = below_flow_top(host.parametrisation, sigmas)
    x0 = host.to_model_scale(samples.float())
    fingerprint = host.fingerprint()

    def method_and_back(
        denoiser: Denoiser, latent: Tensor, conds: Mapping[str, Conditioning]
    ) -> tuple[Trajectory, Tensor | None]:
        trajectory = invert(
            denoiser,
            latent,
            sigmas,
            conds["positive"],
            method,
            fingerprint=fingerprint,
            latent_format=host.latent_format,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        if not verify:
            return trajectory, None
        return trajectory, sample_ddim(denoiser, trajectory.noise, sigmas, conds["positive"])

    trajectory, back = host.run(x0, {"positive": positive}, method_and_back, gradients=method == "spdinv")
    picture: float | None = None
    if back is not None and host.vae is not None:
        picture = float(psnr(host.decode_latent(back), host.decode_latent(trajectory.source)).mean())
    return Inverted(
        trajectory,
        noise_samples(host, trajectory),
        None if back is None else latent_psnr(back, trajectory.source),
        picture,
    )


def below_flow_top(parametrisation: Parametrisation, sigmas: Tensor) -> Tensor:
    """``sigmas`` with :data:`FLOW_TOP` in the place of a top level above it, for flow models."""
    if parametrisation != "flow" or float(sigmas[0]) <= FLOW_TOP:
        return sigmas
    return torch.cat([sigmas.new_tensor([FLOW_TOP]), sigmas[sigmas < FLOW_TOP]])


def noise_samples(host: ComfyHost, trajectory: Trajectory) -> Tensor:
    """The inverted noise as ``samples`` of a LATENT, for core's samplers with their own noise switched off."""
    return noisy_samples(host, trajectory.noise, float(trajectory.sigmas[0]))


def noisy_samples(host: ComfyHost, latent: Tensor, sigma: float) -> Tensor:
    """A latent at level ``sigma`` as ``samples`` that core's samplers go on with, their own noise switched off."""
    # Core scales what a flow model starts from by its share of the picture at that level.
    return host.from_model_scale(latent / picture_share(sigma, host.parametrisation))
