"""The mask family: from exact to box without ever shrinking, to the latent grid without losing lines."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from retrace.core.errors import InvalidImage, InvalidSchedule, InvalidSetting, MissingPackage
from retrace.masks import feather, feather_inward, latent_mask, mask_precision, precision_kernel, shrink_schedule

pytestmark = pytest.mark.rounding

LEVELS = 5


def blob(seed: int, size: int = 48) -> torch.Tensor:
    """Random smooth blobs [1,H,W], several and of any shape, away from nothing in particular."""
    noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=(size, size), mode="bicubic") > 0.7).float()[:, 0]


def boxes(mask: torch.Tensor) -> torch.Tensor:
    """The union of the bounding boxes of the 8-connected components, by flood fill: independent of scipy."""
    result, left = torch.zeros_like(mask), {tuple(p) for p in mask.nonzero().tolist()}
    while left:
        queue = [left.pop()]
        found = list(queue)
        while queue:
            b, y, x = queue.pop()
            near = {(b, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
            found += near
        _, ys, xs = zip(*found, strict=True)
        result[found[0][0], min(ys) : max(ys) + 1, min(xs) : max(xs) + 1] = 1
    return result


def disc(size: int, radius: float, centre: tuple[float, float]) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (((y - centre[0]) ** 2 + (x - centre[1]) ** 2) <= radius**2).float()[None]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_levels_go_from_the_exact_mask_to_the_boxes_and_never_shrink(seed: int, soft: bool) -> None:
    mask = blob(seed)
    assert 0 < mask.mean() < 1
    family = [mask_precision(mask, level, LEVELS, soft=soft) for level in range(LEVELS + 1)]
    assert torch.equal(family[0], mask)
    assert torch.equal(family[-1], boxes(mask))
    for smaller, larger in itertools.pairwise(family):
        assert (smaller <= larger).all()


def test_a_disc_grows_at_every_level() -> None:
    areas = [mask_precision(disc(64, 20, (32, 32)), level).sum().item() for level in range(LEVELS + 1)]
    assert areas[0] == disc(64, 20, (32, 32)).sum() and areas[-1] == 40 * 40
    shares = [(area - areas[0]) / (areas[-1] - areas[0]) for area in areas]
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(shares)), shares


def test_a_thin_diagonal_stroke_is_one_instance_and_grows() -> None:
    mask = torch.eye(40)[None]
    areas = [mask_precision(mask, level).sum().item() for level in range(LEVELS + 1)]
    assert areas == sorted(set(areas)) and areas[-1] == 1600


def test_growth_scales_with_the_instance() -> None:
    small, large = disc(64, 12, (30, 30)), disc(640, 120, (300, 300))
    for level in range(1, LEVELS):
        grown = F.interpolate(mask_precision(small, level)[None], scale_factor=10)[0]
        reference = mask_precision(large, level)
        assert abs(grown.sum() / reference.sum() - 1) < 0.05


def test_sigma_and_kernel_grow_with_level_and_side() -> None:
    kernels = [precision_kernel(level, 5, 100) for level in range(6)]
    assert [sigma for _, sigma in kernels] == pytest.approx([0.1, 5, 10, 15, 20, 25])
    assert all(size % 2 == 1 and size >= 2 * math.ceil(3 * sigma) + 1 for size, sigma in kernels)
    assert precision_kernel(2, 5, 200)[1] == 2 * precision_kernel(2, 5, 100)[1]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("level", range(LEVELS + 1))
def test_objects_grow_independently_and_keep_their_own_size_and_box(level: int, soft: bool) -> None:
    large, small = disc(96, 22, (30, 30)), disc(96, 5, (80, 70))
    both = mask_precision(torch.maximum(large, small), level, soft=soft)
    apart = [mask_precision(one, level, soft=soft) for one in (large, small)]
    assert torch.equal(both, torch.maximum(*apart))


def test_an_object_inside_the_box_of_another() -> None:
    frame = torch.zeros(1, 40, 40)
    frame[:, 5:35, 5:8] = 1
    frame[:, 32:35, 5:35] = 1  # an L: its box holds the dot
    dot = torch.zeros(1, 40, 40)
    dot[:, 10:14, 25:28] = 1
    both = mask_precision(frame + dot, 2)
    assert torch.equal(both, torch.maximum(mask_precision(frame, 2), dot))


def test_a_batch_is_its_masks() -> None:
    masks = torch.cat([blob(1), blob(2), torch.zeros(1, 48, 48), torch.ones(1, 48, 48)])
    for level in (0, 3, LEVELS):
        whole = mask_precision(masks, level)
        assert torch.equal(whole, torch.cat([mask_precision(one[None], level) for one in masks]))
        assert whole[2].max() == 0 and whole[3].min() == 1


def test_soft_masks() -> None:
    hard = disc(48, 12, (24, 24))
    mask = 0.6 * hard
    keep = [mask_precision(mask, level, soft=True) for level in range(LEVELS + 1)]
    assert torch.equal(keep[0], mask)
    assert torch.equal(keep[-1], torch.full_like(mask, 0.6) * boxes(hard))
    assert all(level.max() == mask.max() for level in keep)
    assert keep[2].unique().numel() > 10  # a ramp, not a step
    assert torch.equal(mask_precision(mask, 2), mask_precision(hard, 2))  # 0/1 output takes what is at least one half
    assert torch.equal(mask_precision(0.2 * hard + 0.4 * disc(48, 6, (24, 24)), 0), disc(48, 6, (24, 24)))


def test_the_soft_ramp_cut_at_half_is_the_binary_mask() -> None:
    mask = blob(3)
    for level in range(LEVELS + 1):
        assert torch.equal((mask_precision(mask, level, soft=True) >= 0.5).float(), mask_precision(mask, level))


def test_invisible_values_do_not_stretch_the_box() -> None:
    mask = disc(48, 8, (24, 24)) + 0.001 * disc(48, 30, (24, 24))
    box = mask_precision(mask.clamp(0, 1), LEVELS, soft=True)
    assert (box > 0.5).sum() == 16 * 16


def test_type_is_kept_and_the_input_untouched() -> None:
    mask = blob(4).half()
    before = mask.clone()
    for level in (0, 2, LEVELS):
        result = mask_precision(mask, level)
        assert result.dtype == torch.float16 and result.data_ptr() != mask.data_ptr()
    assert torch.equal(mask, before)


def test_precision_errors() -> None:
    mask = blob(5)
    with pytest.raises(InvalidSetting, match="level: got 6, but a whole number 0 to 5"):
        mask_precision(mask, 6, 5)
    with pytest.raises(InvalidSetting, match="levels: got 0"):
        mask_precision(mask, 0, 0)
    with pytest.raises(InvalidSetting, match="threshold: got 0"):
        mask_precision(mask, 1, threshold=0)
    with pytest.raises(InvalidSetting, match="sigma_max: got 2"):
        mask_precision(mask, 1, sigma_max=2)
    with pytest.raises(InvalidImage, match=r"highest value is 0\.3.*Choose soft output"):
        mask_precision(mask * 0.3, 1)
    with pytest.raises(InvalidImage, match=r"mask\[None\]"):
        mask_precision(mask[0], 1)


def test_a_missing_kornia_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(MissingPackage, match=r"needed to blur masks.*pip install kornia"):
        mask_precision(blob(5), 1)


@pytest.mark.parametrize("offset", range(8))
def test_a_line_of_one_pixel_survives(offset: int) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[:, 8 + offset] = 1
    expected = torch.zeros(1, 4, 4)
    expected[:, 1] = 1
    assert torch.equal(latent_mask(mask), expected)
    assert torch.equal(latent_mask(mask, mode="any"), expected)
    assert torch.allclose(latent_mask(mask, mode="area"), expected / 8)


def test_latent_modes_on_soft_values() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[0, 3, 3], mask[0, 4, 4], mask[0, 0, 8] = 0.25, 0.5, 0.75
    assert latent_mask(mask).tolist() == [[[0.5, 0.75], [0, 0]]]
    assert latent_mask(mask, mode="any").tolist() == [[[1, 1], [0, 0]]]
    assert latent_mask(mask, mode="area").tolist() == [[[0.75 / 64, 0.75 / 64], [0, 0]]]
    assert latent_mask(mask, mode="nearest").tolist() == [[[0.5, 0], [0, 0]]]


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(32, 24, 4, 3), (21, 34, 3, 4)])
def test_nearest_reads_the_middle_of_a_cell_as_pil_does(height: int, width: int, rows: int, columns: int) -> None:
    mask = torch.rand(1, height, width, generator=torch.Generator().manual_seed(0))
    found = latent_mask(mask, mode="nearest", size=(rows, columns))
    middles = [[(int((i + 0.5) * height / rows), int((j + 0.5) * width / columns)) for j in range(columns)]
               for i in range(rows)]  # fmt: skip
    assert found[0].tolist() == [[mask[0, y, x].item() for y, x in row] for row in middles]
    small = Image.fromarray(mask[0].numpy()).resize((columns, rows), Image.Resampling.NEAREST)
    assert found[0].tolist() == numpy.asarray(small).tolist()


def test_latent_sizes() -> None:
    assert latent_mask(torch.ones(2, 24, 40), factor=4).shape == (2, 6, 10)
    for x in range(19):  # 19 pixels on 2 cells: every pixel reaches one
        mask = torch.zeros(1, 8, 19)
        mask[..., x] = 1
        assert latent_mask(mask, size=(1, 2)).max() == 1
    with pytest.raises(InvalidImage, match=r"19x8 pixels.*multiples of 8.*Crop or resize"):
        latent_mask(torch.ones(1, 8, 19))
    with pytest.raises(InvalidSetting, match="one of max, area, any, nearest"):
        latent_mask(torch.ones(1, 8, 8), mode="bilinear")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="factor: got 0"):
        latent_mask(torch.ones(1, 8, 8), factor=0)


def side_of_dot(mask: torch.Tensor) -> int:
    side = math.isqrt(int(mask.sum()))
    assert side * side == mask.sum()
    return side


def test_shrink_schedule_of_the_reference() -> None:
    dot = torch.zeros(1, 16, 16)
    dot[0, 8, 8] = 1
    sides = [side_of_dot(mask) for mask in shrink_schedule(dot, steps=50, stages=3)]
    assert sides == [7] * 13 + [5] * 13 + [3] * 13 + [1] * 11


@pytest.mark.parametrize("stages", range(5))
@pytest.mark.parametrize("steps", range(1, 31))
def test_any_schedule_only_shrinks_and_ends_on_the_mask(steps: int, stages: int) -> None:
    dot = torch.zeros(1, 16, 16)
    dot[0, 8, 8] = 1
    sides = [side_of_dot(mask) for mask in shrink_schedule(dot, steps, stages)]
    assert len(sides) == steps and sides[-1] == 1
    assert sides == sorted(sides, reverse=True)
    if steps > stages:
        assert set(sides) == {1 + 2 * i for i in range(stages + 1)}


def test_shrink_schedule_keeps_soft_values_batches_and_no_stages() -> None:
    masks = torch.rand(2, 6, 6)
    assert all(mask is masks for mask in shrink_schedule(masks, 3, 0))
    first = shrink_schedule(masks, 4, 1)[0]
    assert torch.equal(first, F.max_pool2d(masks, 3, stride=1, padding=1))
    with pytest.raises(InvalidSetting, match="stages: got -1"):
        shrink_schedule(masks, 3, -1)
    with pytest.raises(InvalidSchedule, match="steps: got 0"):
        shrink_schedule(masks, 0, 1)


def test_soft_values_dilate_by_maximum_where_the_reference_makes_them_one() -> None:
    dot = torch.zeros(1, 9, 9)
    dot[0, 4, 4] = 0.5
    first = shrink_schedule(dot, 4, 1)[0]
    assert first.sum() == 9 * 0.5 and first.max() == 0.5
    reference = shrink_schedule((dot > 0).float(), 4, 1)[0]  # a kernel of ones over a mask that is cut at 1
    assert torch.equal(reference, F.conv2d(dot[:, None], torch.ones(1, 1, 3, 3), padding=1)[:, 0].gt(0).float())


def test_feather_reaches_exactly_its_radius() -> None:
    edge = torch.zeros(1, 5, 40)
    edge[..., 20:] = 1
    soft = feather(edge, 4)
    assert soft[..., :16].max() == 0
    assert torch.allclose(soft[..., 24:], torch.ones(1, 5, 16))  # the right and upper borders do not fade
    assert (soft[..., 16:24].diff(dim=-1) > 0).all()
    assert torch.allclose(soft + soft.flip(-1), torch.ones_like(soft))
    assert feather(edge, 0) is edge


def test_inward_feather_stays_inside() -> None:
    mask = blob(7)
    faded = feather_inward(mask, 3)
    assert (faded <= mask).all() and torch.equal(faded > 0, mask > 0)
    edge = torch.zeros(1, 5, 20)
    edge[..., 10:] = 1
    t = torch.tensor([1, 2, 3]) / 4
    assert torch.allclose(feather_inward(edge, 3)[0, 0, 10:13], t * t * (3 - 2 * t))
    assert feather_inward(edge, 3)[..., 13:].min() == 1
    assert feather_inward(torch.ones(1, 5, 5), 3).min() == 1
    assert feather_inward(torch.zeros(1, 5, 5), 3).max() == 0
    assert torch.equal(feather_inward(edge * 0.05, 3), (edge * 0.05).minimum(feather_inward(edge, 3)))


@pytest.mark.parametrize("function", [feather, feather_inward])
@pytest.mark.parametrize("radius", [-1, float("nan"), "2"])
def test_a_radius_that_is_none(function: Callable[[torch.Tensor, float], torch.Tensor], radius: float) -> None:
    with pytest.raises(InvalidSetting, match="radius: got"):
        function(torch.ones(1, 4, 4), radius)
