"""From the gradient of a loss to a changed estimate of the clean latent, which any sampler can use."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_choice, check_whole
from ..core.errors import InvalidSetting, RetraceError
from ..core.host import Parametrisation, picture_share
from ..core.schedule import step_of
from .decoders import Decoder
from .objective import ClipGuidance

GradientPath = Literal["x0", "full"]
Move = Literal["score", "variance"]
Predict = Callable[[Tensor], Tensor]
"""A latent ``[B, C, h, w]`` to its guided clean estimate."""


FAINTEST = 0.02
"""Share of the image in a flow model's latent below which there is nothing to guide, and 1 / share blows up."""


@dataclass(frozen=True)
class Schedule:
    """On which steps to guide, and how.

    Args:
        path: ``"full"`` takes the gradient through the network, to the noisy latent; ``"x0"`` stops at the clean
            estimate (He et al. 2024, MPGD), which needs no backward pass of the network.
        first, last: the noise levels between which to guide.
        every: n-th step of these only.
        dsg: above 0 only the direction of the gradient counts, and the next latent of a sampler with DDPM's noise
            (``euler_ancestral``) moves by this share of the length of that noise (Yang et al. 2024, eq. 12), however
            large the weights are.
        move: how far the gradient moves the estimate. ``"score"``: the gradient is a part of the score, whatever the
            sampler (DDIM in Dhariwal & Nichol 2021, algorithm 2). The mean of a DDPM step then moves by
            ``beta / sqrt(1 - beta)`` times the gradient. ``"variance"``: by the variance of the step, ``beta (1 -
            abar') / (1 - abar)`` with the next level's ``abar'``, as in their algorithm 1 and the code of Blended
            Diffusion; only for samplers with DDPM's noise. It is weaker, by far at low noise, and nothing in the last
            step. We keep the score as the default: a strength then means the same under every sampler, and the late
            steps, which draw the details, are guided as well.

    Raises:
        InvalidSetting: another path or move, ``every`` below 1, or a negative ``dsg``.
    """

    path: GradientPath = "x0"
    first: float = math.inf
    last: float = 0.0
    every: int = 1
    dsg: float = 0.0
    move: Move = "score"

    def __post_init__(self) -> None:
        check_choice("gradient", self.path, get_args(GradientPath))
        check_choice("move", self.move, get_args(Move))
        check_whole("every", self.every)
        if not 0 <= self.dsg < math.inf:
            raise InvalidSetting(f"dsg: got {self.dsg}, but 0 (off) or more is needed (try 0.1).")

    @classmethod
    def reference(cls) -> Schedule:
        """That of the authors' code with its DDPM sampler, our ``euler_ancestral``.

        Their network also learned the variance, between ``beta (1 - abar') / (1 - abar)`` and ``beta``; models without
        a learned one take the former. With their ``--ddim``, our ``euler``, it is ``Schedule("full")``.
        """
        return cls("full", move="variance")

    def guides(self, sigmas: Tensor) -> list[bool]:
        """For each step of ``sigmas`` ``[N + 1]`` whether it is guided."""
        levels = sigmas.tolist()
        # Upwards, as an inversion goes, there is nothing to guide.
        inside = [self.last <= s <= self.first and s > below for s, below in pairwise(levels)]
        counted = 0
        result = []
        for yes in inside:
            result.append(yes and counted % self.every == 0)
            counted += yes
        return result


class GuidedRun:
    """CLIP guidance for one run of a sampler.

    Args:
        guidance: what the image is to become.
        schedule: when and how.
        sigmas: the levels ``[N + 1]`` of the run, most noise first.
        decode: latents to images.
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
        self.sigmas = sigmas.detach().float().cpu().clone()  # uni_pc writes into the list that it is given
        self.guided = schedule.guides(self.sigmas)
        self.differentiable = differentiable
        self.parametrisation = parametrisation
        self.generator = torch.Generator().manual_seed(seed)
        self.words = guidance.words()
        self.backwards = 0
        """backward passes through the network so far, counted per image"""
        self.losses: list[Tensor] = []
        """mean loss of every guided call; tensors, so that no step waits for the device"""

    def guide(self, x: Tensor, sigma: float, predict: Predict) -> Tensor:
        """The clean estimate of ``x`` ``[B, C, h, w]`` at level ``sigma``, moved to where the loss is smaller.

        Where another guidance around this one wants gradients to ``x``, they pass through the estimate, not the move.

        Raises:
            RetraceError: the gradient is NaN, or the prediction has none.
        """
        step = step_of(self.sigmas, sigma)
        share = picture_share(sigma, self.parametrisation)
        if not self.guided[step] or share < FAINTEST:
            return predict(x)
        inner = torch.is_grad_enabled() and x.requires_grad
        if self.schedule.path == "full":
            with self.differentiable():
                own = x if inner else x.detach().clone().requires_grad_()
                denoised = predict(own)
                if not denoised.requires_grad:
                    raise RetraceError(
                        "CLIP guidance: no gradient comes through the model; a patch on it (a cache, for example) "
                        "hands out predictions of its own. Remove it, or choose the gradient path 'x0'."
                    )
                (gradient,) = torch.autograd.grad(self._loss(own, denoised, sigma), own, retain_graph=inner)
            self.backwards += len(x)
            # D = (x + sigma^2 score) / alpha (Tweedie), and the gradient is a part of the score.
            move = sigma**2 / share * gradient
        else:
            denoised = predict(x)
            with torch.inference_mode(False), torch.enable_grad():
                own = denoised.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self._loss(x.detach().clone(), own, sigma), own)
            # The Jacobian of D times sigma^2 / alpha is the covariance of what x may come from: for unit variance
            # sigma^2 / (alpha^2 + sigma^2) on average (Song et al. 2023, PiGDM), which stands in for it here.
            move = sigma**2 / (share**2 + sigma**2) * gradient
        denoised = denoised if inner else denoised.detach()
        if not bool(torch.isfinite(move).all()):
            raise RetraceError(
                f"CLIP guidance: the gradient at noise level {sigma:.4g} is NaN or infinite. Run the model in bf16 or "
                "32-bit, the VAE in 32-bit, or lower the weights."
            )
        if self.schedule.dsg:
            move = self._of_length(move, step)
        elif self.schedule.move == "variance":
            move = move * self._variance_share(step)
        return denoised - move.to(denoised)

    def _loss(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        image = self.decode(denoised)
        shown = None
        if self.guidance.look.shown == "mixed":
            # The authors' code shows f D + (1 - f) x_t with f = sqrt(1 - alpha_bar), x_t variance-preserving.
            share = picture_share(sigma, self.parametrisation)
            total = math.hypot(share, sigma)
            f = sigma / total
            shown = self.decode(denoised * f + x / total * (1 - f))
        loss = self.guidance.loss(image, self.words, self.generator, shown)
        self.losses.append(loss.detach().mean())
        return loss.sum()

    def _of_length(self, move: Tensor, step: int) -> Tensor:
        """``move`` with the length for which an ancestral step goes ``dsg`` times as far as its noise."""
        if not 0 < float(self.sigmas[step + 1]) < float(self.sigmas[step]):
            return torch.zeros_like(move)
        noise, pull = self._ancestral(step)
        norm = move.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
        result: Tensor = move / norm * (self.schedule.dsg * (noise / pull) * math.sqrt(move[0].numel()))
        return result

    def _variance_share(self, step: int) -> float:
        """What takes the move by the score to the one whose mean moves by its variance times the gradient.

        Both are meant for latents of unit variance: there the gradient is ``total`` times, and the mean ``1 / total``.
        """
        if float(self.sigmas[step + 1]) <= 0:
            return 0.0
        noise, pull = self._ancestral(step)
        sigma, sigma_next = float(self.sigmas[step]), float(self.sigmas[step + 1])
        shares = [picture_share(s, self.parametrisation) for s in (sigma, sigma_next)]
        total, total_next = (math.hypot(share, s) for share, s in zip(shares, (sigma, sigma_next), strict=True))
        return noise**2 * total / total_next / (pull * sigma**2 / shares[0])

    def _ancestral(self, step: int) -> tuple[float, float]:
        """Of :func:`ancestral_step`: the length of its noise, and how far its mean goes with the clean estimate."""
        sigma, sigma_next = float(self.sigmas[step]), float(self.sigmas[step + 1])
        low = sigma_next**2 / sigma
        share, share_next, share_low = (picture_share(s, self.parametrisation) for s in (sigma, sigma_next, low))
        down = low * share_next / share_low
        return math.sqrt(sigma_next**2 - down**2), share_next - down * share / sigma
