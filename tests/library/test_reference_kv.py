"""Reference KV without a model: which row reads which, where the layers begin, and when it applies."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retrace.attention.reference_kv import ReferenceKV, default_first_layer, reference_rows
from retrace.core.errors import RetraceError
from retrace.core.host import AttentionCall, Row

pytestmark = pytest.mark.rounding


def call(rows: list[Row], kind: Any = "self", index: int = 5, sigma: float = 2.0) -> AttentionCall:
    return AttentionCall(kind, "up.0", index, 2, 3, tuple(rows), sigma, F.scaled_dot_product_attention)


def batch(conds: list[int], images: int) -> list[Row]:
    return [Row(cond, image) for cond in conds for image in range(images)]


def tensors(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v  # type: ignore[no-any-return]


class TestRows:
    @pytest.mark.parametrize("conds", [[0], [0, 1], [1, 0]])
    def test_edits_read_the_reference_of_their_condition(self, conds: list[int]) -> None:
        rows = batch(conds, 3)
        q, k, v = tensors(len(rows))
        out = ReferenceKV(5)(call(rows), q, k, v)
        for number, row in enumerate(rows):
            reference = rows.index(Row(row.cond, 0))
            torch.testing.assert_close(out[number], by_hand(q[number], k[reference], v[reference]))

    def test_the_order_of_the_rows_does_not_matter(self) -> None:
        rows = batch([0, 1], 2)
        for order in permutations(range(4)):
            shuffled = [rows[n] for n in order]
            found = reference_rows(tuple(shuffled))
            assert [shuffled[n] for n in found] == [Row(row.cond, 0) for row in shuffled]

    def test_entries_of_one_condition_stay_apart(self) -> None:
        """Core puts two areas of a conditioning into one batch; both are condition 0."""
        assert reference_rows(tuple(batch([0, 0, 1], 3))) == (0, 0, 0, 3, 3, 3, 6, 6, 6)

    def test_a_single_image_is_refused(self) -> None:
        q, k, v = tensors(2)
        with pytest.raises(RetraceError, match=r"batch of 1.*\[reference, edit.*the reference first"):
            ReferenceKV(0)(call(batch([0, 1], 1)), q, k, v)

    def test_an_edit_without_its_reference_is_refused(self) -> None:
        with pytest.raises(RetraceError, match="without its reference"):
            reference_rows((Row(0, 0), Row(0, 1), Row(1, 1)))

    def test_gradients_reach_the_reference_through_the_edit(self) -> None:
        q, k, v = (tensor.requires_grad_() for tensor in tensors(2))
        ReferenceKV(0)(call(batch([0], 2)), q, k, v)[1].sum().backward()
        assert v.grad is not None and bool(v.grad[0].abs().sum() > 0) and bool((v.grad[1] == 0).all())


class TestWindow:
    def untouched(self, control: ReferenceKV, **where: Any) -> bool:
        q, k, v = tensors(2)
        out = control(call(batch([0], 2), **where), q, k, v)
        assert torch.equal(out[0], F.scaled_dot_product_attention(q, k, v)[0])
        return torch.equal(out, F.scaled_dot_product_attention(q, k, v))

    def test_cross_attention_is_left_alone(self) -> None:
        assert self.untouched(ReferenceKV(0), kind="cross")
        assert not self.untouched(ReferenceKV(0), kind="self")

    @pytest.mark.parametrize(("last", "controlled"), [(None, range(10, 16)), (12, range(10, 13)), (10, [10])])
    def test_layers(self, last: int | None, controlled: Any) -> None:
        control = ReferenceKV(10, last)
        assert [n for n in range(16) if not self.untouched(control, index=n)] == list(controlled)

    def test_noise_levels(self) -> None:
        control = ReferenceKV(0, start=5.0, end=1.0)
        assert [s for s in (9.0, 5.0, 3.0, 1.0, 0.5) if not self.untouched(control, sigma=s)] == [5.0, 3.0, 1.0]
        assert not self.untouched(ReferenceKV(0), sigma=1e9) and not self.untouched(ReferenceKV(0), sigma=0.0)


SD15 = ["down.0"] * 2 + ["down.1"] * 2 + ["down.2"] * 2 + ["mid.0"] + ["up.1"] * 3 + ["up.2"] * 3 + ["up.3"] * 3
SDXL = ["down.1"] * 4 + ["down.2"] * 20 + ["mid.0"] * 10 + ["up.0"] * 30 + ["up.1"] * 6
PEBBLE = ["down.0", "down.1", "mid.0", "up.0", "up.0", "up.1", "up.1"]


class TestDefaultLayer:
    @pytest.mark.parametrize(
        ("blocks", "first"),
        [(SD15, 10), (SDXL, 34), (PEBBLE, 3), (["down.0", "up.7"], 1), (["up.9", "up.10", "up.11"], 1)],
        ids=["SD1.x and SD2.x", "SDXL", "Pebble", "one level", "two digits"],
    )
    def test_two_finest_levels_of_the_decoder(self, blocks: list[str], first: int) -> None:
        assert default_first_layer(blocks) == first

    def test_a_decoder_without_attention(self) -> None:
        with pytest.raises(RetraceError, match=r"no attention in its decoder.*0 to 1"):
            default_first_layer(["down.0", "mid.0"])

    @pytest.mark.parametrize(("family", "expected"), [("sd1", SD15), ("sd2", SD15), ("sdxl", SDXL)])
    def test_layers_of_diffusers(self, family: str, expected: list[str]) -> None:
        """The shapes of the published models; the networks are empty shells."""
        from retrace.hosts.diffusers import configs
        from retrace.hosts.diffusers.attention import attention_blocks

        diffusers = pytest.importorskip("diffusers")
        described = {"sd1": configs.Family("sd1"), "sd2": configs._sd2(), "sdxl": configs._sdxl()}[family].unet
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**{k: v for k, v in described.items() if not k.startswith("_")})
        assert attention_blocks(unet) == expected
        assert len(expected) == sum(name.endswith("attn1.processor") for name in unet.attn_processors)
