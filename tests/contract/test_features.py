"""Outputs of a block from a network that is cut after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import RetraceError
from retrace.core.host import AttentionCall
from tests.rounding import assert_rounds_to

pytestmark = pytest.mark.rounding


def test_blocks_are_named_in_the_order_they_run(subject: Any) -> None:
    blocks = subject.run(torch.randn(1, 4, 16, 16), lambda denoiser, x, conds: denoiser.blocks)
    assert blocks == ("mid.0", "up.0", "up.1")


@pytest.mark.parametrize("block", ["mid.0", "up.0", "up.1"])
def test_a_cut_network_gives_the_features_of_the_whole_one(subject: Any, block: str) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.features([block]) as kept:
            denoiser.denoised(x, 2.0, conds[0])
        before = denoiser.evaluations
        return kept[block], denoiser.features_of(x, 2.0, conds[0], block), denoiser.evaluations - before

    whole, cut, evaluations = subject.run(torch.randn(2, 4, 16, 24), method)
    assert_rounds_to(cut, whole.float(), subject.roundings)
    assert evaluations == 2  # one for each image


def test_the_gradient_of_a_cut_network_is_that_of_the_whole_one(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            y = x.clone().requires_grad_()
            with denoiser.features(["up.0"]) as kept:
                denoiser.denoised(y, 2.0, conds[0])
            whole = torch.autograd.grad(kept["up.0"].square().sum(), y)[0]
            cut = torch.autograd.grad(denoiser.features_of(y, 2.0, conds[0], "up.0").square().sum(), y)[0]
        return whole, cut

    whole, cut = subject.run(torch.randn(1, 4, 16, 16), method, gradients=True)
    assert_rounds_to(cut, whole, 3 * subject.roundings)
    assert float(cut.abs().max()) > 0


def test_nothing_after_the_cut_runs_and_nothing_stays_behind(subject: Any) -> None:
    ran: list[str] = []

    def note(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ran.append(call.block)
        return call.attend(q, k, v)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        before = denoiser.denoised(x, 2.0, conds[0])
        with denoiser.attention(note):
            denoiser.features_of(x, 2.0, conds[0], "up.0")
        return before, denoiser.denoised(x, 2.0, conds[0])

    before, after = subject.run(torch.randn(1, 4, 16, 16), method)
    assert "up.0" in ran and "up.1" not in ran
    assert torch.equal(before, after)


def test_an_unknown_block_is_named(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> None:
        denoiser.features_of(x, 2.0, conds[0], "up.7")

    with pytest.raises(RetraceError, match=r"up\.7"):
        subject.run(torch.randn(1, 4, 16, 16), method)
