"""The optimiser of the hidden layers: momentum whose update is made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Jordan 2024: a quintic that brings every singular value near 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024), scaled as Liu et al. 2025, so that learning rates are those of AdamW.

    For weights of two and more dimensions; a convolution's kernel counts as the matrix ``[out, in * height * width]``,
    which is why :class:`torch.optim.Muon` (matrices only) does not serve here.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is not used
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                size = 0.2 * math.sqrt(max(ahead.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalise(ahead).view_as(p), alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values come out between about 0.7 and 1.2."""
    a, b, c = _QUINTIC
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    orthogonal: Tensor = (x.T if tall else x).to(matrix)
    return orthogonal
