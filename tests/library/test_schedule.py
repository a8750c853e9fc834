"""Timestep grids against the values of their references, and checks of sigmas."""

from __future__ import annotations

import pytest
import torch

from retrace.core.errors import InvalidSchedule
from retrace.core.schedule import (
    GRIDS,
    check_sigmas,
    grid_sigmas,
    grid_timesteps,
    reference_sigmas,
    reference_timesteps,
    respaced,
    truncate,
)

pytestmark = pytest.mark.rounding


def training(total: int = 1000) -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, total, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas).sqrt()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("leading_0", list(range(980, -1, -20))),
        ("leading_1", list(range(981, 0, -20))),
        ("uniform_plus_1", list(range(981, 0, -20))),
        ("trailing", list(range(999, 18, -20))),
        ("respaced", [round(i * 999 / 49) for i in range(49, -1, -1)]),
        ("respaced_ddim", list(range(980, -1, -20))),
    ],
)
def test_fifty_steps_of_every_grid(name: str, expected: list[int]) -> None:
    assert grid_timesteps(name, 1000, 50) == expected


def test_every_grid_says_where_it_comes_from() -> None:
    for name, grid in GRIDS.items():
        assert name.isidentifier() and grid.title and len(grid.source) > 40


def test_counts_that_do_not_divide() -> None:
    # As diffusers (DDIMScheduler, set_timesteps(30) and (7)) and latent-diffusion (make_ddim_timesteps) answer.
    assert grid_timesteps("leading_1", 1000, 30)[:2] == [958, 925]
    assert grid_timesteps("trailing", 1000, 7) == [999, 856, 713, 570, 428, 285, 142]
    assert len(grid_timesteps("uniform_plus_1", 1000, 30)) == 30
    parity = reference_timesteps("uniform_plus_1", 1000, 30)
    assert len(parity) == 31 and parity[:2] == [991, 958]


def test_respacing_of_guided_diffusion_and_glide() -> None:
    assert respaced(1000, "100") == [round(i * 999 / 99) for i in range(100)]
    assert respaced(1000, "100")[:3] == [0, 10, 20] and respaced(1000, "100")[-2:] == [989, 999]
    fast = respaced(1000, "fast27")
    assert len(fast) == 27
    assert (fast[0], fast[1], fast[9], fast[10], fast[19]) == (0, 22, 199, 200, 399)
    assert fast[20:] == [400, 500, 599, 600, 799, 800, 997]
    assert respaced(1000, "ddim25") == list(range(0, 1000, 40))
    assert respaced(10, "3,2") == [0, 2, 4, 5, 9]
    assert respaced(7, "1") == [0]
    with pytest.raises(InvalidSchedule, match="no whole stride through 1000 timesteps makes 300"):
        respaced(1000, "ddim300")
    with pytest.raises(InvalidSchedule, match=r"section 2 of '3,9' asks for 9 timesteps, but 1 to 5 fit"):
        respaced(10, "3,9")
    for text in ("", "fast", "10;10", "-5", "ddim10,5"):
        with pytest.raises(InvalidSchedule, match="respacing: got"):
            respaced(1000, text)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50, 100])
def test_sigmas_descend_to_zero_in_steps_plus_one_levels(name: str, steps: int) -> None:
    levels = training()
    sigmas = grid_sigmas(name, levels, steps)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == levels.dtype
    assert sigmas[-1] == 0
    assert check_sigmas(sigmas) is sigmas
    assert torch.equal(sigmas[:-1], levels[grid_timesteps(name, 1000, steps)])


def test_parity_ends_where_the_reference_ends() -> None:
    levels = training()
    offset_0 = reference_sigmas("leading_0", levels, 50)
    assert offset_0[-1] == offset_0[-2] == levels[0]  # the closing no-op of the P2P notebooks
    offset_1 = reference_sigmas("leading_1", levels, 50)
    assert (offset_1[-2], offset_1[-1]) == (levels[1], levels[0])
    assert float(levels[0]) == pytest.approx(0.0292, abs=1e-4)
    for name in GRIDS:
        sigmas = reference_sigmas(name, levels, 50)
        assert check_sigmas(sigmas) is sigmas
    assert reference_sigmas("respaced", levels, 100)[-1] == 0


def test_bad_requests_are_errors_that_say_what_is_needed() -> None:
    levels = training()
    with pytest.raises(InvalidSchedule, match="got 'karras', but one of leading_0, leading_1"):
        grid_sigmas("karras", levels, 10)
    for steps in (0, -1, 1001, 2.5):
        with pytest.raises(InvalidSchedule, match="steps: got"):
            grid_sigmas("leading_0", levels, steps)  # type: ignore[arg-type]
    with pytest.raises(InvalidSchedule, match=r"reaches timestep 1000, but this model was trained on 0\.\.999"):
        grid_sigmas("leading_1", levels, 1000)
    with pytest.raises(InvalidSchedule, match="ascending"):
        grid_sigmas("leading_0", levels.flip(0), 10)
    with pytest.raises(InvalidSchedule, match="zero terminal SNR"):
        grid_sigmas("leading_0", torch.tensor([1.0, float("inf")]), 1)
    with pytest.raises(InvalidSchedule, match="got shape"):
        grid_sigmas("leading_0", levels[None], 10)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.0], "got a list, but a list .* Connect a SIGMAS output"),
        (torch.zeros(2, 2), r"shape \[2, 2\]"),
        (torch.tensor([1.0]), "no step at all.*at least two"),
        (torch.tensor([]), "0 noise level"),
        (torch.tensor([2.0, float("nan"), 0.0]), "NaN or infinity"),
        (torch.tensor([float("inf"), 1.0, 0.0]), "NaN or infinity"),
        (torch.tensor([1.0, -1.0]), "negative"),
        (torch.tensor([0.0, 1.0, 2.0]), r"They ascend: turn them round \(sigmas\.flip\(0\)\)"),
        (torch.tensor([3.0, 1.0, 2.0, 0.0]), r"level 3 \(2\) is not below level 2 \(1\)"),
        (torch.tensor([3.0, 3.0, 2.0, 0.0]), r"level 2 \(3\) is not below level 1 \(3\)"),
        (torch.tensor([1.0, 1.0]), "is not below"),
        (torch.tensor([0.0, 0.0]), "is not below"),
    ],
)
def test_sigmas_that_no_sampler_could_follow(sigmas: object, message: str) -> None:
    with pytest.raises(InvalidSchedule, match=f"my sigmas.*{message}"):
        check_sigmas(sigmas, "my sigmas")


def test_truncation_keeps_the_last_steps() -> None:
    sigmas = torch.linspace(10, 0, 51)
    assert torch.equal(truncate(sigmas, 1.0), sigmas)
    assert torch.equal(truncate(sigmas, 0.7), sigmas[-36:])  # 35 steps, as DragDiffusion
    assert len(truncate(sigmas, 0.75)) == 39  # 37.5 rounds to the even 38, as there
    assert len(truncate(sigmas, 0.001)) == 2  # at least one step
    for strength in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(InvalidSchedule, match="strength: got"):
            truncate(sigmas, strength)
