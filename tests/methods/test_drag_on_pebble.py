"""Dragging on Pebble against ground truth, on three training scenes; ``benchmarks.dragging`` measures held-out ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.dragging import GOOD, STEPS, Recipe, Warping, drag, task, warp
from retrace.hosts.diffusers import DiffusersHost

JOBS = [task(index, "train") for index in range(7_000_000, 7_000_003)]  # one, two and three points

RECIPE = Recipe(GOOD, 0.75, lora=False)


@pytest.fixture(scope="module")
def host() -> DiffusersHost:
    return DiffusersHost.load(None, device="cpu")


@pytest.mark.slow
def test_dragged_objects_arrive_and_the_rest_stays(host: DiffusersHost) -> None:
    scores = [drag(host, job, RECIPE, None) for job in JOBS]
    assert sum(score.error for score in scores) / len(JOBS) <= 0.15
    assert all(score.kept for score in scores)
    assert sum(score.background for score in scores) / len(JOBS) >= 28
    assert all(0 < score.backwards <= 210 for score in scores)


@pytest.mark.slow
def test_without_changes_to_speak_of_nothing_moves(host: DiffusersHost) -> None:
    still = replace(RECIPE, settings=replace(GOOD, learning_rate=1e-6, changes=3))
    score = drag(host, JOBS[0], still, None)
    assert 0.9 < score.error < 1.1 and score.kept and score.backwards == 3
    left = round(0.75 * STEPS)
    assert score.evaluations < 25 * left  # the inversion is nearly all of it


def test_warped_objects_arrive_to_the_pixel(host: DiffusersHost) -> None:
    for job in JOBS:
        score = warp(host, job, Warping())
        assert score.error < 0.03 and score.kept and score.backwards == 0
