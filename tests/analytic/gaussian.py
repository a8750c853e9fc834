"""A perfect denoiser: where the data is Gaussian, E[x0 | x] is linear in x and the ODE has a closed solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrace.core.host import LowRank, Parametrisation
from retrace.core.trajectory import Trajectory


@dataclass(frozen=True)
class Mean:
    """Stands for a text condition: it moves the mean of the data, ``embedding`` ``[1, 1, n]``."""

    embedding: Tensor

    def with_embedding(self, embedding: Tensor) -> Mean:
        return Mean(embedding)


@dataclass
class Gaussian:
    """Data N(cond, basis diag(std^2) basis^T) over flattened latents ``[C, h, w]``, a :class:`Denoiser`.

    ``basis`` (orthogonal ``[n, n]``, or None for independent entries) makes the covariance full. ``bend`` adds a
    nonlinear term to the estimate, for what a linear model cannot show; ``gain`` replaces all of it by ``gain * x``.
    """

    shape: tuple[int, int, int]
    std: Tensor
    parametrisation: Parametrisation = "eps"
    basis: Tensor | None = None
    bend: float = 0.0
    gain: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evaluations: int = 0
    blocks: tuple[str, ...] = ()
    backwards: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    on_progress: Callable[[int], None] | None = None

    def _to(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat if self.basis is None else flat @ self.basis

    def _from(self, flat: Tensor) -> Tensor:
        return (flat if self.basis is None else flat @ self.basis.T).view(-1, *self.shape)

    def mean(self, cond: Mean) -> Tensor:
        return self._to(cond.embedding.reshape(1, -1))

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
        self.evaluations += x.shape[0]
        s = float(sigma)
        mu, variance = self.mean(cond), self.std**2
        alpha = 1 - s if self.parametrisation == "flow" else 1.0
        gain = alpha * variance / (alpha**2 * variance + s**2)
        estimate = mu + gain * (self._to(x) - alpha * mu)
        if self.gain is not None:
            estimate = self.gain * self._to(x)
        if self.bend:
            estimate = estimate + self.bend * s / (1 + s) * torch.sin(self._to(x) / (1 + s))
        if x.requires_grad:
            estimate.register_hook(self._count)
        return self._from(estimate)

    def _count(self, gradient: Tensor) -> None:
        self.backwards += gradient.shape[0]

    def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: Sequence[Any]) -> list[Tensor]:
        return [self.denoised(x, sigma, cond) for cond in conds]

    @contextmanager
    def differentiable(self, *, recompute: bool = False) -> Iterator[None]:
        with torch.enable_grad():
            yield

    def attention(self, hook: Any) -> Any:
        raise NotImplementedError

    def projections(self) -> dict[str, tuple[int, int]]:
        raise NotImplementedError

    def adapters(self, adapters: Mapping[str, LowRank]) -> Any:
        raise NotImplementedError

    def features(self, blocks: Sequence[str]) -> Any:
        raise NotImplementedError

    def features_of(self, x: Tensor, sigma: Tensor | float, cond: Any, block: str) -> Tensor:
        raise NotImplementedError

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        self.steps.append((step, total))
        if self.on_progress is not None:
            self.on_progress(step)

    def draw(self, count: int, cond: Mean, seed: int = 0) -> Tensor:
        """Data samples ``[count, C, h, w]``."""
        noise = torch.randn(count, len(self.std), generator=torch.Generator().manual_seed(seed), dtype=self.std.dtype)
        return self._from(self.mean(cond) + self.std * noise)

    def exact(self, x: Tensor, sigma: float, sigma_next: float, cond: Mean) -> Tensor:
        """The solution of the probability-flow ODE: every component keeps its place in its distribution."""
        mu = self.mean(cond)

        def law(s: float) -> tuple[Tensor, Tensor]:
            alpha = 1 - s if self.parametrisation == "flow" else 1.0
            return alpha * mu, (alpha**2 * self.std**2 + s**2).sqrt()

        (centre, spread), (centre_next, spread_next) = law(sigma), law(sigma_next)
        return self._from(centre_next + (self._to(x) - centre) / spread * spread_next)


def natural(
    size: int = 8, parametrisation: Parametrisation = "eps", exponent: float = 1.0, dtype: torch.dtype = torch.float64
) -> Gaussian:
    """One channel of ``size`` x ``size``, amplitude falling with frequency as in pictures, random basis, variance 1."""
    f = torch.fft.fftfreq(size, dtype=torch.float64) * size
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().flatten().clamp(min=0.5)
    std = radius**-exponent
    noise = torch.randn(size**2, size**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    std = std / std.pow(2).mean().sqrt()
    return Gaussian((1, size, size), std.to(dtype), parametrisation, basis.to(dtype))


def centre(model: Gaussian, level: float = 0.3) -> Mean:
    n = len(model.std)
    return Mean(level * torch.linspace(-1, 1, n, dtype=model.std.dtype).view(1, 1, n))


def ladder(steps: int, top: float, power: float) -> Tensor:
    """``[steps + 1]`` levels from ``top`` to 0; refining it refines every part, the last step too."""
    return top * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power


def stable_diffusion_sigmas() -> Tensor:
    """Training levels ``[1000]`` of SD 1.x: betas 0.00085..0.012, linear in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas).sqrt()


def number(trajectory: Trajectory, name: str) -> float:
    """What the report of ``trajectory`` says under ``name``."""
    value = trajectory.report[name]
    assert isinstance(value, (int, float))
    return value


def numbers(trajectory: Trajectory, name: str) -> list[float]:
    """The same where it says one number per step."""
    value = trajectory.report[name]
    assert isinstance(value, list)
    return [float(one) for one in value]


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def slope(counts: Sequence[int], errors: Sequence[float]) -> float:
    """The order of convergence: minus the slope of the least-squares line through (log count, log error)."""
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())
