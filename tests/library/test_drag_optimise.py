"""The drag loops on a network whose features are the latent itself: a blob is dragged, and every look is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retrace.core.errors import (
    InvalidImage,
    InvalidPoints,
    InvalidSchedule,
    InvalidSetting,
    RetraceError,
    UnsupportedModel,
)
from retrace.core.host import Parametrisation
from retrace.drag.area import single_mask
from retrace.drag.latent.area import sampled_cells, touched_cells
from retrace.drag.latent.edit import drag_points
from retrace.drag.latent.result import Dragged
from retrace.drag.latent.settings import DragOptions, DragSettings, GoodDragOptions, levels_of
from retrace.drag.latent.task import Changes, DragSource, DragTask, Trace, WholeLook
from retrace.drag.points import DragPoints, PointPair

pytestmark = pytest.mark.rounding

SIGMAS = torch.tensor([4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.4, 0.2, 0.0])


@dataclass
class Mirror:
    """A Denoiser whose clean estimate is the latent, and whose features are the latent blurred."""

    parametrisation: Parametrisation = "eps"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evaluations: int = 0
    cut: int = 0
    blocks: tuple[str, ...] = ("mid.0", "up.0", "up.1")
    factor: float = 1.0
    reports: list[tuple[int, int, bool]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    recomputed: list[bool] = field(default_factory=list)
    memory: Exception | None = None  # raised where a whole graph would be kept

    def _features(self, x: Tensor, cond: float) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) * cond * self.factor

    def denoised_each(self, x: Tensor, sigma: Any, conds: Sequence[float]) -> list[Tensor]:
        self.evaluations += len(conds)
        maps = torch.cat([self._features(x, cond) for cond in conds])
        self.kept.update({name: maps for name in self.kept})
        return [x * cond for cond in conds]

    def denoised(self, x: Tensor, sigma: Any, cond: float) -> Tensor:
        return self.denoised_each(x, sigma, [cond])[0]

    def features_of(self, x: Tensor, sigma: Any, cond: float, block: str) -> Tensor:
        self.evaluations += 1
        self.cut += 1
        return self._features(x, cond)

    @contextmanager
    def features(self, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        self.kept = {name: torch.empty(0) for name in blocks}
        yield self.kept
        self.kept = {}

    @contextmanager
    def differentiable(self, *, recompute: bool = False) -> Iterator[None]:
        self.recomputed.append(recompute)
        if self.memory is not None and not recompute:
            raise self.memory
        with torch.enable_grad():
            yield

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        self.reports.append((step, total, denoised is not None))


def blob(row: float, column: float, size: int = 16) -> Tensor:
    """A hill on a flat ground in one channel, and its slopes in two more: features that tell places apart."""
    r, c = torch.meshgrid(torch.arange(size) - float(row), torch.arange(size) - float(column), indexing="ij")
    hill = torch.exp(-(r**2 + c**2) / 8)
    return torch.stack((hill, hill * r, hill * c, torch.zeros_like(hill)))[None]


def points(*pairs: tuple[tuple[float, float], tuple[float, float]], size: int = 128) -> DragPoints:
    return DragPoints(tuple(PointPair(*pair) for pair in pairs), torch.zeros(1, size, size, 3))


RIGHT = points(((0.35, 0.5), (0.6, 0.5)))


def source(x: Tensor, sigmas: Tensor = SIGMAS, cond: float = 1.0, **more: Any) -> DragSource:
    return DragSource(x, sigmas, cond, **more)  # type: ignore[arg-type]


def run_with(
    model: Mirror, settings: DragSettings, where: DragPoints = RIGHT, mask: Tensor | None = None, **more: Any
) -> Dragged:
    x = blob(8, 5.5) * 17**0.5  # of unit variance, it is blob(...) itself
    return drag_points(model, source(x, noisy=True, **more), where, mask, settings)  # type: ignore[arg-type]


def run(model: Mirror, where: DragPoints = RIGHT, mask: Tensor | None = None, **settings: Any) -> Dragged:
    return run_with(model, DragSettings(**settings), where, mask)


def task_of(x: Tensor, cond: float = 1.0, **more: Any) -> DragTask:
    """A task on a grid of the latent's own size, from (8, 8) to (8, 12)."""
    return DragTask(
        model=Mirror(),  # type: ignore[arg-type]
        source=source(x, cond=cond, **more),
        points=RIGHT,
        mask=None,
        settings=DragSettings(),
        handles=torch.tensor([[8.0, 8.0]]),
        targets=torch.tensor([[8.0, 12.0]]),
        grid=(x.shape[-2], x.shape[-1]),
        block="up.0",
        area=torch.ones(1, 1, *x.shape[-2:]),
    )


def test_a_point_arrives() -> None:
    made = run(Mirror(), learning_rate=0.03, changes=100)
    assert made.arrived == 1 and made.changes < 100
    assert made.path[0].tolist() == [[32.0, 22.0]]  # half of 64, and 0.35 of it rounded
    columns = made.path[:, 0, 1]
    assert (columns.diff() >= -3).all() and columns[-1] - columns[0] > 12  # of the 16 it was asked to go


def test_every_change_is_one_look_and_one_backward_pass() -> None:
    model = Mirror()
    made = run(model, changes=5)
    # One look more tells where the last change led. Without a mask nothing is punished, so the network is cut; the
    # whole of it runs once, for the preview.
    assert (made.changes, made.evaluations, made.backwards, len(made.losses)) == (5, 7, 5, 5)
    assert (len(made.path), model.cut) == (6, 6)
    assert model.reports == [(i, 5, True) for i in range(1, 6)]
    exact = run_with(Mirror(), replace(DragSettings.reference(), changes=5))
    assert (exact.evaluations, len(exact.path)) == (5, 5)
    torch.testing.assert_close(exact.edited, made.edited)


def test_a_hard_mask_cuts_the_network_and_leaves_the_outside_bit_identical() -> None:
    model, mask = Mirror(), torch.zeros(1, 128, 128)
    mask[:, 40:90, 30:100] = 1
    made = run(model, mask=mask, hard_mask=True, changes=6)
    outside = (touched_cells(mask, 16, 16) == 0).expand(1, 4, 16, 16)
    assert torch.equal(made.edited[outside], made.reference[outside])
    assert not torch.equal(made.edited, made.reference)
    assert (model.cut, made.evaluations) == (7, 8)  # the whole network runs once, for the preview
    assert all(shown for _, _, shown in model.reports)


def test_a_soft_mask_holds_the_outside() -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :44] = 1  # the point itself; where it goes is outside
    outside = (touched_cells(mask, 16, 16) == 0).expand(1, 4, 16, 16)
    left = [
        float((made.edited - made.reference)[outside].abs().sum())
        for made in (run(Mirror(), mask=mask, mask_weight=w, changes=30) for w in (0.0, 1.0))
    ]
    assert left[1] < 0.5 * left[0]


def test_points_already_there_change_nothing() -> None:
    made = run(Mirror(), points(((0.5, 0.5), (0.51, 0.5))))
    assert (made.changes, made.arrived) == (0, 1)
    assert torch.equal(made.edited, made.reference)


@pytest.mark.parametrize("mode", ["dragdiffusion", "gooddrag"])
@pytest.mark.parametrize(
    "pairs",
    [
        [((0.0, 0.0), (0.5, 0.5))],
        [((1.0, 1.0), (0.0, 0.0))],
        [((0.5, 1.0), (0.5, 0.0)), ((0.0, 0.5), (1.0, 0.5))],
        [((0.3, 0.3), (0.6, 0.6)), ((0.3, 0.3), (0.6, 0.3))],
        [((i / 29, 0.2), (i / 29, 0.8)) for i in range(30)],
    ],
    ids=["corner", "corner to corner", "borders", "on top of each other", "thirty"],
)
def test_points_anywhere_work(mode: str, pairs: Any) -> None:
    made = run(Mirror(), points(*pairs), mode=mode, changes=21)
    assert torch.isfinite(made.edited).all() and made.path.shape[1:] == (len(pairs), 2)
    assert (made.path >= 0).all() and (made.path <= 63).all()


def test_one_pixel_of_a_mask_frees_its_cell() -> None:
    mask = torch.zeros(1, 128, 128)
    mask[0, 65, 47] = 1
    assert touched_cells(mask, 16, 16).nonzero().tolist() == [[0, 0, 8, 5]]
    assert sampled_cells(mask, 16, 16).all()  # as in the reference, it gets lost and is no mask any more
    assert torch.isfinite(run(Mirror(), mask=mask, hard_mask=True, changes=3).edited).all()


def test_pictures_of_other_proportions_are_refused_and_other_sizes_are_not() -> None:
    wide = DragPoints(RIGHT.pairs, torch.zeros(1, 100, 200, 3))
    with pytest.raises(InvalidImage, match="proportions"):
        run(Mirror(), wide)
    with pytest.raises(InvalidImage, match="proportions"):
        run(Mirror(), mask=torch.ones(1, 64, 128))
    assert run(Mirror(), DragPoints(RIGHT.pairs, torch.zeros(1, 515, 515, 3)), changes=1).changes == 1


def test_what_cannot_be_dragged_is_said() -> None:
    with pytest.raises(InvalidPoints, match="at least one"):
        run(Mirror(), points())
    with pytest.raises(UnsupportedModel, match="UNet"):
        run(Mirror(blocks=()))
    with pytest.raises(RetraceError, match=r"up\.7.*mid\.0, up\.0, up\.1"):
        run(Mirror(), block="up.7")
    with pytest.raises(InvalidSetting, match="swirl"):
        DragSettings(mode="swirl")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"patch_radius: got 0.*at least 1.*gooddrag"):
        DragSettings(mode="gooddrag", patch_radius=0)
    with pytest.raises(InvalidSetting, match="changes: got 0"):
        DragSettings(changes=0)
    with pytest.raises(InvalidSetting, match="learning_rate: got nan"):
        DragSettings(learning_rate=float("nan"))
    with pytest.raises(InvalidImage, match="empty"):
        drag_points(Mirror(), source(torch.zeros(1, 4, 16, 16)), RIGHT)  # type: ignore[arg-type]


def test_gooddrag_drags_and_denoises_in_turns() -> None:
    model = Mirror()
    made = run(model, mode="gooddrag", changes=12, learning_rate=1e-6)
    # Nine steps are left, so it drags at two levels: two rounds of three changes at each of them.
    assert made.changes == made.backwards == 12
    assert made.sigmas.tolist() == SIGMAS[2:].tolist()
    # The changes, the untouched picture, the steps down, and a look at both where it ends.
    assert made.evaluations == 12 + 2 + 2 + 2
    # The clean estimate of this model is the latent, so a step down leaves it as it is.
    torch.testing.assert_close(made.reference, blob(8, 5.5) * 17**0.5)


def test_gooddrag_gives_up_when_no_point_moves() -> None:
    made = run(Mirror(), mode="gooddrag", learning_rate=1e-6)
    assert made.changes == 30 and len(made.sigmas) == len(SIGMAS) - 1  # ten rounds of three, all at the first level


def test_gooddrag_moves_a_blob() -> None:
    made = run(Mirror(), mode="gooddrag", learning_rate=0.03)
    columns = torch.arange(16.0)
    centre = [float((F.relu(x[0, 0]) * columns).sum() / F.relu(x[0, 0]).sum()) for x in (made.reference, made.edited)]
    assert centre[1] - centre[0] > 1.5


def test_guidance_weights_the_features_of_both_conditions() -> None:
    x = blob(8, 5.5)
    task = task_of(x, 2.0, uncond=1.0, scale=7.5)
    look = task.look(x, 0.0, 0.0)
    share = 7.5 / 14
    at = look.features.at(torch.tensor([[8.0, 8.0]]))[0]
    plain = Mirror()._features(x, 1.0)[0, :, 8, 8]
    torch.testing.assert_close(at, torch.cat([(1 - share) * plain, share * 2 * plain]))
    assert isinstance(look, WholeLook)
    torch.testing.assert_close(look.denoised, x + 7.5 * (2 * x - x))
    cut = replace(task, cut=True).look(x, 0.0, 0.0)
    torch.testing.assert_close(cut.features.at(torch.tensor([[8.0, 8.0]]))[0], at)


def test_a_gradient_that_overflows_is_left_out_and_one_that_keeps_doing_so_is_an_error() -> None:
    trace = Trace()
    changes = Changes(task_of(torch.zeros(1, 1, 8, 8)), trace, torch.zeros(1, 1, 8, 8), 0.1)
    # Overflows in half precision, at the next scale not.
    assert not changes.apply((changes.z.half() * 100).sum().float())
    assert torch.equal(changes.z.detach(), changes.held) and trace.losses == []
    assert changes.apply((changes.z.half() * 100).sum().float())
    assert (trace.backwards, len(trace.losses)) == (2, 1)
    assert not torch.equal(changes.z.detach(), changes.held)
    with pytest.raises(RetraceError, match="NaN or infinite"):
        for _ in range(8):
            changes.apply(changes.z.sum() * torch.inf)


def test_settings_become_options_of_their_mode() -> None:
    assert DragSettings().options(35) == DragOptions()
    assert DragSettings(mode="gooddrag").options(38) == GoodDragOptions()
    given = DragSettings(mode="gooddrag", changes=63, learning_rate=0.5, search_radius=5).options(38)
    assert given == GoodDragOptions(rounds=3, limit=63, learning_rate=0.5, search_radius=5)
    fewer = DragSettings(mode="gooddrag", mask_weight=0.5, patch_radius=2).options(18)
    assert fewer == GoodDragOptions(levels=3, limit=90, mask_weight=0.5, patch_radius=2)
    assert DragSettings.reference("gooddrag").options(20) == GoodDragOptions(look_at_end=False)
    assert DragSettings(changes=7, patch_radius=0, mask_weight=0.0).options(35) == DragOptions(
        changes=7, patch_radius=0, mask_weight=0.0
    )


def test_gooddrag_drags_at_the_same_part_of_any_schedule() -> None:
    assert [levels_of(steps) for steps in (38, 35, 18, 7, 3, 2)] == [7, 6, 3, 1, 1, 1]
    assert levels_of(35, 7) == 7
    assert levels_of(35, 50) == 34


def test_gooddrag_makes_no_more_changes_than_it_may() -> None:
    made = [run(Mirror(), mode="gooddrag", changes=n, learning_rate=1e-6).changes for n in (1, 5, 10)]
    assert made == [1, 5, 10]


def test_gooddrag_keeps_what_a_hard_mask_does_not_free() -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, 40:90, 30:100] = 1
    made = run(Mirror(factor=0.5), mask=mask, mode="gooddrag", hard_mask=True, changes=9)
    outside = (touched_cells(mask, 16, 16) == 0).expand(1, 4, 16, 16)
    assert torch.equal(made.edited[outside], made.reference[outside])
    assert not torch.equal(made.edited, made.reference)


def test_an_empty_mask_is_none() -> None:
    assert single_mask(torch.zeros(1, 64, 64)) is None and single_mask(torch.zeros(3, 64, 64)) is None
    assert torch.equal(run(Mirror(), mask=torch.zeros(1, 64, 64), changes=2).edited, run(Mirror(), changes=2).edited)


def test_a_drag_that_runs_out_of_memory_begins_again_with_less() -> None:
    model = Mirror(memory=MemoryError("no room"))
    made = run(model, changes=3)
    assert model.recomputed == [False, True] and made.recompute and made.changes == 3
    assert not run(Mirror(), changes=3).recompute
    with pytest.raises(MemoryError):
        run(Mirror(memory=MemoryError("no room")), changes=3, recompute=False)
    with pytest.raises(ValueError, match="something else"):
        run(Mirror(memory=ValueError("something else")), changes=3)


def test_mistakes_are_said_before_the_inversion() -> None:
    model = Mirror()
    with pytest.raises(InvalidImage, match="batch of 2"):
        drag_points(model, source(blob(8, 5).repeat(2, 1, 1, 1)), RIGHT)  # type: ignore[arg-type]
    for changes in (None, 3):
        settings = DragSettings(mode="gooddrag", changes=changes)
        with pytest.raises(InvalidSchedule, match="only 1 step"):
            drag_points(model, source(blob(8, 5), SIGMAS[:2]), RIGHT, None, settings)  # type: ignore[arg-type]
    with pytest.raises(InvalidImage, match="one mask for one image"):
        drag_points(model, source(blob(8, 5)), RIGHT, torch.ones(2, 128, 128))  # type: ignore[arg-type]
    assert model.evaluations == 0


def test_the_report_says_how_far_every_point_came_and_what_it_cost() -> None:
    two = points(((0.35, 0.5), (0.6, 0.5)), ((0.1, 0.9), (0.1, 0.9)))
    mask = torch.zeros(1, 128, 128)
    mask[:, 40:90] = 1
    made = run_with(Mirror(), DragSettings(changes=2), two, mask, steps=20)
    distance = float(made.distances[0]) * 2  # cells of two pixels
    assert made.text(100).splitlines() == [
        "dragdiffusion, 2 changes, 9 of 20 steps left to sample",
        "1 of 2 point(s) arrived",
        f"pixels to the target  1: {distance:.0f}  2: 0",
        "outside the mask, where nothing may change: 2",
        f"{made.evaluations} network evaluations, 2 backward passes, {made.seconds:.1f} s",
        "peak memory 100 MB",
    ]
    assert "9 of 9 steps" in run(Mirror(), changes=1).text()
    assert "as asked for" in run(Mirror(), changes=1, recompute=True).text()
    ways = json.loads(made.json())["points"]
    assert ways[0]["handle"] == [0.35, 0.5] and ways[0]["target"] == [0.6, 0.5]
    assert len(ways[0]["path"]) == len(made.path) and ways[0]["path"][0] == [22 / 64, 0.5]
