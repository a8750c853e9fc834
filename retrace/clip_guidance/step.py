"""From the gradient of a loss to a changed estimate of the clean latent, which any sampler can use."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import RetraceError
from ..host import Parametrisation, picture_share
from ..schedule import step_of
from .decoders import Decoder
from .guidance import ClipGuidance

Path = Literal["full", "x0"]
Predict = Callable[[Tensor], Tensor]
"""A latent ``[B, C, h, w]`` to its guided clean estimate."""


@dataclass(frozen=True)
class Schedule:
    """On which steps to guide, and how.

    ``path``: ``full`` takes the gradient through the network, to the noisy latent; ``x0`` stops at the clean estimate
    (He et al. 2024, MPGD), which needs no backward pass of the network. ``first`` and ``last`` are the noise levels
    between which to guide, ``every`` n-th step of these only. ``dsg`` > 0 takes only the direction of the gradient and
    moves the latent by this share of the length that the noise of a DDPM step has (Yang et al. 2024, eq. 12), however
    large the weights are.

    Raises:
        RetraceError: another path, ``every`` below 1, or a negative ``dsg``.
    """

    path: Path = "x0"
    first: float = math.inf
    last: float = 0.0
    every: int = 1
    dsg: float = 0.0

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            raise RetraceError(f"gradient: got {self.path!r}, but one of {', '.join(get_args(Path))} is needed.")
        if self.every < 1:
            raise RetraceError(f"every: got {self.every}, but 1 (every step) or more is needed.")
        if not 0 <= self.dsg < math.inf:
            raise RetraceError(f"dsg: got {self.dsg}, but 0 (off) or more is needed (try 0.1).")

    def guides(self, sigmas: Tensor) -> list[bool]:
        """For each step of ``sigmas`` ``[N + 1]`` whether it is guided."""
        inside = [self.last <= float(s) <= self.first and float(s) > 0 for s in sigmas[:-1]]
        counted = 0
        result = []
        for yes in inside:
            result.append(yes and counted % self.every == 0)
            counted += yes
        return result


class GuidedRun:
    """CLIP guidance for one run of a sampler.

    Args:
        guidance: what the picture shall become.
        schedule: when and how.
        sigmas: the levels ``[N + 1]`` of the run, most noise first.
        decode: latents to pictures.
        differentiable: a context in which gradients flow through the network, for the path ``full``.
        parametrisation: of the model.
        seed: of the views.
    """

    def __init__(
        self,
        guidance: ClipGuidance,
        schedule: Schedule,
        sigmas: Tensor,
        decode: Decoder,
        differentiable: Callable[[], AbstractContextManager[None]],
        parametrisation: Parametrisation,
        seed: int = 0,
    ) -> None:
        self.guidance, self.schedule, self.decode = guidance, schedule, decode
        self.sigmas = sigmas.detach().float().cpu()
        self.guided = schedule.guides(self.sigmas)
        self.differentiable = differentiable
        self.parametrisation = parametrisation
        self.generator = torch.Generator().manual_seed(seed)
        self.words = guidance.words()
        self.backwards = 0
        """backward passes through the network so far, counted per image"""
        self.losses: list[float] = []
        """mean loss of every guided call"""

    def guide(self, x: Tensor, sigma: float, predict: Predict) -> Tensor:
        """The clean estimate of ``x`` ``[B, C, h, w]`` at level ``sigma``, moved to where the loss is smaller."""
        step = step_of(self.sigmas, sigma)
        if not self.guided[step]:
            return predict(x)
        if self.schedule.path == "full":
            with self.differentiable():
                own = x.detach().clone().requires_grad_()
                denoised = predict(own)
                (gradient,) = torch.autograd.grad(self._loss(own, denoised, sigma), own)
            self.backwards += len(x)
            # D = (x + sigma^2 score) / alpha (Tweedie), and the gradient is a part of the score.
            move = sigma**2 / picture_share(sigma, self.parametrisation) * gradient
        else:
            denoised = predict(x)
            with torch.inference_mode(False), torch.enable_grad():
                own = denoised.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self._loss(x.detach().clone(), own, sigma), own)
            # The Jacobian of D times sigma^2 / alpha is the covariance of what x may come from: for unit variance
            # sigma^2 / (alpha^2 + sigma^2) on average (Song et al. 2023, PiGDM), which stands in for it here.
            share = picture_share(sigma, self.parametrisation)
            move = sigma**2 / (share**2 + sigma**2) * gradient
        denoised = denoised.detach()
        if not bool(torch.isfinite(move).all()):
            raise RetraceError(
                f"CLIP Guidance: the gradient at noise level {sigma:.4g} is NaN or infinite. Run the model in bf16 or "
                "32-bit, lower the weights, or choose the gradient path 'x0'."
            )
        if self.schedule.dsg:
            move = self._of_length(move, sigma, float(self.sigmas[step + 1]))
        return denoised - move.to(denoised)

    def _loss(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        picture = self.decode(denoised)
        shown = None
        if self.guidance.parity:
            # The authors' code shows f D + (1 - f) x_t with f = sqrt(1 - alpha_bar), x_t variance-preserving.
            share = picture_share(sigma, self.parametrisation)
            total = math.hypot(share, sigma)
            f = sigma / total
            shown = self.decode(denoised * f + x / total * (1 - f))
        loss = self.guidance.loss(picture, self.words, self.generator, shown)
        self.losses.append(float(loss.detach().mean()))
        return loss.sum()

    def _of_length(self, move: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """``move`` of the estimate with the length that makes the step go ``dsg`` times as far as a DDPM step's noise.

        That noise has the length ``sqrt(n) sigma_next sqrt(sigma^2 - sigma_next^2) / sigma``, and of a move of the
        estimate a share ``1 - sigma_next^2 / sigma^2`` reaches the next latent.
        """
        if sigma_next <= 0:
            return torch.zeros_like(move)
        norm = move.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
        spread = sigma * sigma_next / math.sqrt(max(sigma**2 - sigma_next**2, 1e-12))
        return move / norm * (self.schedule.dsg * spread * math.sqrt(move[0].numel()))
