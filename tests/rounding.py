"""How far two ways to the same number may lie apart by rounding alone.

Processors add the terms of a sum in different orders: by the width of their vectors, with or without fused
multiply-add, by how many threads share the work, by how many rows a pass holds. What is equal on paper then differs in
the last bits, and on every machine by something else. A tolerance that was measured on one fails on the next, so these
come from the arithmetic.

A rounding changes a value by at most the unit roundoff u = eps / 2 of its size. For n of them in a row, each as likely
up as down, Higham & Mary 2019 (SIAM J. Sci. Comput. 41(5), theorem 2.4) bound the relative error by lambda sqrt(n) u,
except with a probability of at most 2 exp(-lambda^2 / 2). With lambda = 8 that is 3e-14, nothing even for the millions
of values that the tests look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_LAMBDA = 8.0


def roundings(network: nn.Module) -> int:
    """Roundings in a row on the way through a network: one for each of its layers that has weights.

    A layer adds thousands of terms, but kernels add them in blocks, in many accumulators, and then the error of the sum
    stays near that of rounding the result once (Blanchard, Higham & Mary 2020, SIAM J. Sci. Comput. 42(3)). Errors of
    one layer are independent of those of another. A backward pass computes as much again for the values and for the
    weights, so a gradient takes three times as many.
    """
    return sum(getattr(module, "weight", None) is not None for module in network.modules())


def tolerance(count: int, size: float | Tensor = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference between two results that each took ``count`` roundings.

    Args:
        count: how many roundings follow one another, a sum counting as one; for a network :func:`roundings`.
        size: of the values; of a tensor its largest. Where the result is a small difference of large values, theirs.
        dtype: what was computed in.
    """
    if isinstance(size, Tensor):
        size = float(size.abs().max())
    return _LAMBDA * math.sqrt(2 * count) * torch.finfo(dtype).eps / 2 * size


def assert_rounds_to(
    found: Tensor | Iterable[Tensor],
    expected: Tensor | Iterable[Tensor],
    count: int,
    size: float | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Both are the same up to ``count`` roundings of values as large as the largest expected one, or as ``size``."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        allowed = tolerance(count, other if size is None else size, dtype)
        torch.testing.assert_close(one, other, rtol=0, atol=allowed)


def assert_trained_alike(found: Tensor, expected: Tensor, count: int) -> None:
    """Both are what Adam made of gradients that are the same up to ``count`` roundings.

    Adam divides a gradient by its own size. Where that is as small as the roundings, a step may go either way, and no
    single entry can be asked for. The share of such entries is what rounding allows, their share of the norm its root.
    """
    difference = float((found - expected).norm() / expected.norm())
    assert difference <= tolerance(count) ** 0.5, f"{difference:.2e} of the norm, {tolerance(count) ** 0.5:.2e} allowed"
