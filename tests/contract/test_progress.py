"""Progress reports and the stop button."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_progress_is_reported_to_the_end(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> None:
        for step in range(1, 5):
            denoiser.progress(step, 4, x)

    subject.run(torch.randn(1, 4, 16, 16), method)
    assert subject.reports[0] == (1, 4)
    assert subject.reports[-1] == (4, 4)


def test_a_stop_leaves_everything_as_it_was(subject: Any) -> None:
    x = torch.randn(1, 4, 16, 16)

    def plain(denoiser: Any, x: Any, conds: Any) -> Any:
        return denoiser.denoised(x, 1.0, conds[0])

    def hooked(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable(), denoiser.features(["up.0"]), denoiser.attention(lambda call, q, k, v: q):
            denoiser.denoised(x, 1.0, conds[0])
            with subject.interrupted() as expected:
                stopped.append(expected)
                denoiser.progress(1, 2, x)

    before = subject.run(x, plain)
    stopped: list[type[BaseException]] = []
    with pytest.raises(BaseException) as caught:
        subject.run(x, hooked, gradients=True)
    assert isinstance(caught.value, stopped[0])
    assert torch.is_inference_mode_enabled()
    assert torch.equal(subject.run(x, plain), before)
    assert not any(module._forward_hooks for network in subject.networks() for module in network.modules())
