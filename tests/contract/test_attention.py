"""Attention hooks and features: right places, right rows, and no trace when they do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.errors import RetraceError
from retrace.core.host import Row
from tests.rounding import assert_rounds_to

pytestmark = pytest.mark.rounding


# Pebble: one transformer per down block and in the middle, two per up block; the latent is halved once.
BLOCKS = ["down.0", "down.1", "mid.0", "up.0", "up.0", "up.1", "up.1"]


def passing(call: Any, q: Any, k: Any, v: Any) -> Any:
    return call.attend(q, k, v)


def test_a_hook_that_changes_nothing_changes_nothing(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        before = denoiser.denoised_each(x, 2.0, conds)
        with denoiser.attention(passing):
            inside = denoiser.denoised_each(x, 2.0, conds)
        return before, inside, denoiser.denoised_each(x, 2.0, conds)

    before, inside, after = subject.run(torch.randn(2, 4, 16, 24), method, "a red circle", "")
    assert_rounds_to(inside, before, subject.roundings)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 16, 24), (3, 4, 20, 10)])
@pytest.mark.parametrize("prompts", [("a red circle",), ("a red circle", "")])
def test_hooks_see_every_layer_with_its_place_and_rows(
    subject: Any, shape: tuple[int, ...], prompts: tuple[str, ...]
) -> None:
    batch, _, height, width = shape
    calls: list[tuple[Any, Any, Any]] = []

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        assert not q.is_inference() and not k.is_inference()
        assert v.shape == k.shape
        calls.append((call, q.shape, k.shape))
        return call.attend(q, k, v)

    def method(denoiser: Any, x: Any, conds: Any) -> None:
        with denoiser.attention(hook):
            denoiser.denoised_each(x, 2.0, conds)

    subject.run(torch.randn(shape), method, *prompts)
    assert {row for call, *_ in calls for row in call.rows} == {
        Row(cond, image) for cond in range(len(prompts)) for image in range(batch)
    }
    for cond in range(len(prompts)):  # a host may run conditions together or one after the other
        seen = [entry for entry in calls if any(row.cond == cond for row in entry[0].rows)]
        assert [(c.index, c.kind) for c, *_ in seen] == [(i, kind) for i in range(7) for kind in ("self", "cross")]
        assert [c.block for c, *_ in seen] == [block for block in BLOCKS for _ in range(2)]
    for call, q, k in calls:
        size = (height, width) if call.block in ("down.0", "up.1") else (height // 2, width // 2)
        assert (call.height, call.width) == size
        assert q[0] == k[0] == len(call.rows) and q[1] == 4
        assert q[2] == size[0] * size[1]
        assert k[2] == (q[2] if call.kind == "self" else 77)
        assert call.sigma == pytest.approx(2.0)


def test_rows_belong_to_the_conditions_they_name(subject: Any) -> None:
    """Silence the text of condition 1 only: condition 0 must not notice."""

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        out = call.attend(q, k, v)
        keep = torch.tensor([row.cond == 0 or row.image == 1 for row in call.rows], dtype=out.dtype, device=out.device)
        return out * keep.view(-1, 1, 1, 1)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        before = denoiser.denoised_each(x, 2.0, conds)
        with denoiser.attention(hook):
            return before, denoiser.denoised_each(x, 2.0, conds)

    before, after = subject.run(torch.randn(2, 4, 16, 16), method, "a red circle", "a blue square")
    assert_rounds_to(after[0], before[0], subject.roundings)
    assert_rounds_to(after[1][1], before[1][1], subject.roundings)
    assert not torch.allclose(after[1][0], before[1][0], atol=1e-3)


def test_attend_is_softmax_attention(subject: Any) -> None:
    def by_hand(call: Any, q: Any, k: Any, v: Any) -> Any:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.attention(by_hand):
            return denoiser.denoised(x, 2.0, conds[0]), x

    result, x = subject.run(torch.randn(1, 4, 16, 16), method)
    expected = subject.run(x, lambda denoiser, x, conds: denoiser.denoised(x, 2.0, conds[0]))
    assert_rounds_to(result, expected, subject.roundings)


def test_keys_of_one_image_can_serve_another(subject: Any) -> None:
    """MasaCtrl's mutual self-attention: k and v may be exchanged between rows."""

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        if call.kind == "self":
            k, v = k[:1].expand_as(k), v[:1].expand_as(v)
        return call.attend(q, k, v)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        before = denoiser.denoised(x, 2.0, conds[0])
        with denoiser.attention(hook):
            return before, denoiser.denoised(x, 2.0, conds[0])

    before, after = subject.run(torch.randn(2, 4, 16, 16), method)
    assert_rounds_to(after[0], before[0], subject.roundings)
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_a_hook_that_raises_is_removed(subject: Any) -> None:
    x = torch.randn(1, 4, 16, 16)

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with pytest.raises(ZeroDivisionError), denoiser.attention(lambda call, q, k, v: 1 / 0):
            denoiser.denoised(x, 2.0, conds[0])
        return denoiser.denoised(x, 2.0, conds[0])

    expected = subject.run(x, lambda denoiser, x, conds: denoiser.denoised(x, 2.0, conds[0]))
    assert torch.equal(subject.run(x, method), expected)


def test_features_have_the_shapes_of_diffusers_blocks(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.features(["up.0", "up.1"]) as kept:
            denoiser.denoised_each(x, 2.0, conds)
            both = dict(kept)
            denoiser.denoised(x, 2.0, conds[1])
            return both, dict(kept)

    both, second = subject.run(torch.randn(2, 4, 16, 24), method, "a red circle", "a blue square")
    # Two conditions of two images; up.0 ends with its upsampler, so both are at full size.
    assert {name: tuple(f.shape) for name, f in both.items()} == {"up.0": (4, 128, 16, 24), "up.1": (4, 64, 16, 24)}
    for name in both:
        assert_rounds_to(both[name][2:], second[name], subject.roundings)


def test_unknown_blocks_are_named(subject: Any) -> None:
    def method(denoiser: Any, x: Any, conds: Any) -> None:
        with denoiser.features(["up.7"]):
            denoiser.denoised(x, 2.0, conds[0])

    with pytest.raises(RetraceError, match=r"up\.7"):
        subject.run(torch.randn(1, 4, 16, 16), method)
