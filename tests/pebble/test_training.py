"""The pieces of the training recipe: the optimiser, the draw of noise levels, and a stage that can be stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from retrace.training.muon import Muon, orthogonalise
from retrace.training.pebble import text_tower, unet
from retrace.training.stage import Stage


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_makes_its_update_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.max() < 1.3 and values.median() > 0.6
    # It turns nothing round: the update still points where the gradient does.
    assert float((orthogonalise(matrix) * matrix).sum()) > 0


def test_muon_moves_as_far_as_adamw_would() -> None:
    weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1e-2, weight_decay=0.0).step()
    assert 0.05 * 1e-2 < float(weight.detach().square().mean().sqrt()) < 1e-2


def test_noise_levels_are_drawn_around_that_of_the_latents() -> None:
    signal = unet.alphas_cumprod()
    levels = ((1 - signal) / signal).sqrt()
    t = unet.draw_timesteps(4000, levels.log(), torch.Generator().manual_seed(0))
    assert int(t.min()) >= 0 and int(t.max()) < len(signal)
    assert 0.8 < float(levels[t].median()) < 1.25
    assert float((t > 900).float().mean()) > 0.01  # no level is left out


def test_a_stage_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def stage(steps: int) -> Stage:
        torch.manual_seed(0)
        cpu = torch.device("cpu")
        return Stage("toy", nn.Linear(4, 4), tmp_path, 1e9, steps, 1e-2, muon=lambda _, w: w.ndim == 2, device=cpu)

    def loss(run: Stage) -> None:
        x = torch.eye(4)
        run.run(lambda generator: (run.model(x + 0.01 * torch.randn(4, 4, generator=generator)) - x).square().mean())

    first = stage(3)
    loss(first)
    assert first.step == 3
    again = stage(6)
    assert again.step == 3 and [len(o.state) for o in again.optimizers] == [1, 1]
    loss(again)
    assert again.step == 6


def test_the_text_tower_ships_only_the_words_it_learned() -> None:
    state = text_tower.to_ship(text_tower.build())
    table = state["text_model.embeddings.token_embedding.weight"]
    known = text_tower.known_tokens()
    assert int((table.abs().sum(1) > 0).sum()) == len(known)
    assert all(name.startswith("text_model.") for name in state)
