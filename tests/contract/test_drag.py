"""Dragging on both hosts: the same picture moves the same way, within what rounding allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import RetraceError
from retrace.core.host import FeatureDenoiser
from retrace.core.schedule import grid_sigmas, truncate
from retrace.drag.latent.edit import drag_points
from retrace.drag.latent.result import Dragged
from retrace.drag.latent.settings import DragSettings
from retrace.drag.latent.task import DragSource
from retrace.drag.points import DragPoints, PointPair
from retrace.models.pebble.scenes import Ground, Object, Scene, render_batch
from tests.rounding import assert_rounds_to, roundings

pytestmark = pytest.mark.rounding

SCENE = Scene(Ground("sand"), (Object("red", "circle", 50, 64, 20),))
POINTS = DragPoints((PointPair((50 / 128, 0.5), (75 / 128, 0.5)),), render_batch([SCENE]).movedim(1, -1))


def dragged(subject: Any, words: tuple[str, ...] = (SCENE.caption(),), scale: float = 1.0, **how: Any) -> Dragged:
    """``noisy`` in ``how`` is the source's; the rest are settings."""
    host, noisy = subject.host, how.pop("noisy", False)
    settings = DragSettings(**{"changes": 2, "inversion": "ddim", **how})
    sigmas = truncate(grid_sigmas("leading_1", host.training_sigmas(), 10), 0.7)

    def method(denoiser: FeatureDenoiser, x: Tensor, conds: Any) -> Dragged:
        uncond = conds[1] if len(conds) > 1 else None
        source = DragSource(x, sigmas, conds[0], noisy, uncond, scale)
        return drag_points(denoiser, source, POINTS, mask(), settings)

    return subject.run(host.encode_image(POINTS.picture), method, *words, gradients=True)  # type: ignore[no-any-return]


def mask() -> Tensor:
    area = torch.zeros(1, 128, 128)
    area[:, 32:96, 16:112] = 1
    return area


@pytest.mark.parametrize("hard", [False, True])
def test_a_change_moves_the_latent_and_counts(subject: Any, hard: bool) -> None:
    made = dragged(subject, hard_mask=hard)
    assert made.reference.shape == made.edited.shape == (1, 4, 16, 16)
    assert made.evaluations == 3 + hard and made.backwards == 2  # a cut network cannot preview: one whole look
    difference = (made.edited - made.reference).abs()
    assert float(difference.max()) > 0 and torch.isfinite(made.edited).all()
    assert not made.edited.requires_grad and not made.edited.is_inference()
    if hard:
        assert float(difference[:, :, :4].max()) == 0


def test_a_cut_network_takes_the_same_first_step(subject: Any) -> None:
    """Without a mask's weight the loss needs the features only, so cutting the network after them changes nothing."""
    whole = dragged(subject, changes=1, mask_weight=0.0)
    cut = dragged(subject, changes=1, mask_weight=0.0, hard_mask=True)
    inside = (mask() > 0)[:, None, ::8, ::8].expand(1, 4, 16, 16)
    torch.testing.assert_close(cut.edited[inside], whole.edited[inside], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"hard_mask": True}, {"mode": "gooddrag"}], ids=["soft", "hard", "gooddrag"])
def test_blocks_that_are_computed_twice_change_nothing(subject: Any, settings: dict[str, Any]) -> None:
    kept = dragged(subject, noisy=True, **settings, recompute=False)
    twice = dragged(subject, noisy=True, **settings, recompute=True)
    torch.testing.assert_close(twice.edited, kept.edited, rtol=1e-4, atol=1e-4)
    assert (twice.evaluations, twice.backwards) == (kept.evaluations, kept.backwards)


def test_a_noisy_latent_is_dragged_where_it_is(subject: Any) -> None:
    made = dragged(subject, noisy=True)
    assert_rounds_to(
        made.reference, subject.host.encode_image(POINTS.picture).float().cpu(), roundings(subject.networks()[1])
    )
    assert made.evaluations == 3


def test_guidance_looks_at_both_conditions(subject: Any) -> None:
    plain = dragged(subject, noisy=True)
    guided = dragged(subject, (SCENE.caption(), ""), 5.0, noisy=True)
    assert guided.evaluations == 2 * plain.evaluations
    assert not torch.allclose(guided.edited, plain.edited)


def test_gooddrag_ends_further_down(subject: Any) -> None:
    made = dragged(subject, mode="gooddrag", changes=18, stop_radius=0.0)
    assert len(made.sigmas) < 8 and made.changes == made.backwards > 0
    assert torch.isfinite(made.edited).all() and not torch.equal(made.edited, made.reference)


def test_a_stopped_drag_leaves_the_model_as_it_was(subject: Any) -> None:
    x = torch.randn(1, 4, 16, 16)

    def plain() -> Tensor:
        return subject.run(x, lambda denoiser, x, conds: denoiser.denoised(x, 2.0, conds[0]))  # type: ignore[no-any-return]

    before = plain()
    with subject.interrupted() as stopped, pytest.raises(stopped):
        dragged(subject, noisy=True)
    assert torch.equal(plain(), before)


def test_a_block_that_the_model_has_not_is_named(subject: Any) -> None:
    with pytest.raises(RetraceError, match=r"up\.3.*mid\.0, up\.0, up\.1"):
        dragged(subject, noisy=True, block="up.3")
