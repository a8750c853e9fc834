"""Null-text optimisation where the denoiser is a formula: what a step must find, and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import InvalidSchedule, InvalidSetting, RetraceError, TrajectoryMismatch
from retrace.core.sampling import sample_ddim
from retrace.core.trajectory import Trajectory
from retrace.inversion.invert import InversionSettings, Method, invert
from retrace.inversion.null_text.optimise import Callback, NullText, NullTextStep, optimise_null_text
from retrace.inversion.null_text.settings import MODES, Mode, NullTextSettings
from retrace.inversion.null_text.steps import Optimisation
from tests.rounding import assert_trained_alike

from .gaussian import Gaussian, Mean, centre, ladder, natural

STEPS = 12
SCALE = 7.5


@dataclass
class Textual(Gaussian):
    """The Gaussian with an embedding per image; counts the backward passes that reach one."""

    def mean(self, cond: Mean) -> Tensor:
        return self._to(cond.embedding.flatten(1).to(self.std))

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
        estimate = super().denoised(x, sigma, cond)
        if cond.embedding.requires_grad:
            estimate.register_hook(self._count)
        return estimate


@dataclass
class Case:
    model: Textual
    trajectory: Trajectory
    cond: Mean
    uncond: Mean

    def optimise(
        self, *, parity: bool = False, alike: bool = False, callback: Callback | None = None, **options: Any
    ) -> NullText:
        self.model.evaluations = self.model.backwards = 0
        settings = NullTextSettings(**{"scale": SCALE, **options})
        return optimise_null_text(
            self.model,
            self.trajectory,
            self.cond,
            self.uncond,
            settings.reference() if parity else settings,
            only_text_differs=alike,
            callback=callback,
        )

    def back(self, found: NullText) -> Tensor:
        x = found.start
        for i, embedding in enumerate(found.embeddings):
            conds = [self.cond, self.uncond]
            conds[1 if found.replaces == "uncond" else 0] = Mean(embedding)
            x = sample_ddim(self.model, x, found.sigmas[i : i + 2], conds[0], conds[1], SCALE)
        return x

    def plain(self) -> Tensor:
        return sample_ddim(
            self.model, self.trajectory.noise, self.trajectory.sigmas, self.cond, self.uncond, scale=SCALE
        )


def case(images: int = 1, method: Method = "ddim", parametrisation: Any = "eps", sigmas: Tensor | None = None) -> Case:
    base = natural(4, parametrisation, dtype=torch.float32)
    model = Textual(base.shape, base.std, parametrisation, base.basis)
    cond = centre(model, 0.3)
    image = model.draw(images, cond, seed=3)
    if sigmas is None:
        sigmas = ladder(STEPS, 0.99 if parametrisation == "flow" else 10.0, 2.0).float()
    trajectory = invert(model, image, sigmas, cond, InversionSettings(method))
    return Case(model, trajectory, cond, Mean(torch.zeros_like(cond.embedding)))


def error(case: Case, x: Tensor) -> float:
    return float((x - case.trajectory.source).norm() / case.trajectory.source.norm())


@pytest.mark.parametrize("parametrisation", ["eps", "v", "flow"])
@pytest.mark.parametrize("parity", [True, False])
def test_guided_sampling_returns_to_the_image(parametrisation: str, parity: bool) -> None:
    this = case(parametrisation=parametrisation)
    found = this.optimise(parity=parity, iterations=60, early_stop=0.0)
    assert error(this, this.back(found)) < 0.05
    assert error(this, this.back(found)) < 0.1 * error(this, this.plain())
    assert found.replaces == "uncond" and found.embeddings.shape == (STEPS, 1, 1, 16)


def test_the_reported_psnr_is_that_of_sampling() -> None:
    this = case()
    found = this.optimise(iterations=3)
    source = this.trajectory.source
    mse = (this.back(found) - source).square().mean()
    assert found.latent_psnr == pytest.approx(
        float(10 * ((source.amax() - source.amin()) ** 2 / mse).log10()), abs=1e-3
    )


def test_the_loss_is_measured_in_the_scale_of_the_papers() -> None:
    this = case()
    found = this.optimise(parity=True, iterations=1)
    first, second = (float(s) for s in this.trajectory.sigmas[:2])
    z, z_next = (this.trajectory.latents[i] / math.sqrt(1 + s * s) for i, s in enumerate((first, second)))
    abar, abar_next = 1 / (1 + first**2), 1 / (1 + second**2)
    eps = [(z * math.sqrt(1 + first**2) - this.model.denoised(this.trajectory.noise, first, c)) / first
           for c in (this.uncond, this.cond)]  # fmt: skip
    guided = eps[0] + SCALE * (eps[1] - eps[0])
    # Song et al. 2021, eq. 12 with eta 0, as the reference writes it.
    clean = (z - (1 - abar) ** 0.5 * guided) / abar**0.5
    step = abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * guided
    assert float(found.losses[0][0, 0]) == pytest.approx(float((step - z_next).square().mean()), rel=1e-4)


class TestCosts:
    def test_parity(self) -> None:
        this = case()
        found = this.optimise(parity=True)
        assert found.evaluations == this.model.evaluations == sum(3 + k for k in found.iterations)
        assert found.backwards == this.model.backwards == sum(found.iterations)
        assert {len(loss) for loss in found.losses} == set(found.iterations) and len(set(found.iterations)) > 1
        for i, loss in enumerate(found.losses):
            # The last one looked at is below the threshold, unless the iterations ran out first.
            below = loss[:, 0] < 1e-5 + 2e-5 * i
            assert not below[:-1].any() and (bool(below[-1]) or len(loss) == 10)

    def test_default(self) -> None:
        this = case()
        found = this.optimise(iterations=4, early_stop=0.0)
        assert this.model.evaluations == found.evaluations == sum(2 + k for k in found.iterations)
        assert this.model.backwards == found.backwards == sum(found.iterations)

    def test_default_where_the_prompt_already_returns(self) -> None:
        """An exact inversion: one evaluation per step, none of them with gradients."""
        this = case(method="fixed_point")
        found = this.optimise(alike=True)
        assert found.evaluations == STEPS and found.backwards == 0
        assert torch.equal(found.embeddings, this.cond.embedding.float().expand(STEPS, 1, 1, -1))
        assert error(this, this.back(found)) < 1e-4

    def test_what_is_shared_changes_nothing(self) -> None:
        this = case()
        one, other = (this.optimise(alike=shared, early_stop=1e-6) for shared in (True, False))
        assert torch.equal(one.embeddings, other.embeddings)
        assert one.evaluations <= other.evaluations

    def test_at_most_a_third_of_parity(self) -> None:
        this = case(sigmas=ladder(50, 10.0, 2.0).float())
        reference, quick = this.optimise(parity=True), this.optimise(alike=True)
        assert quick.evaluations <= reference.evaluations / 3
        # On Gaussian data the prompt alone does nearly all. What is promised is each step's loss; Pebble tells what
        # pictures lose.
        for step, losses in enumerate(quick.losses):
            assert float(losses[-1].max()) < 1e-5 + 2e-5 * step

    def test_from_the_negative_it_evaluates_both_and_begins_there(self) -> None:
        this = case()
        found = this.optimise(start="uncond", alike=True)
        assert found.evaluations == sum(2 + k for k in found.iterations) and found.backwards == sum(found.iterations)
        for step, losses in enumerate(found.losses):
            assert float(losses[-1].max()) < 1e-5 + 2e-5 * 50 * step / STEPS or found.iterations[step] == 10
        contented = this.optimise(start="uncond", early_stop=1e6)
        assert torch.equal(contented.embeddings[0], this.uncond.embedding.cpu())

    def test_a_batch_costs_its_images(self) -> None:
        this = case(images=3)
        found = this.optimise(parity=True, iterations=2, early_stop=0.0)
        assert found.evaluations == 3 * STEPS * (3 + 2) and found.backwards == 3 * STEPS * 2

    def test_steps_between_equal_levels_are_free(self) -> None:
        sigmas = torch.tensor([5.0, 2.0, 0.5, 0.5])
        this = case(sigmas=sigmas)
        found = this.optimise(parity=True, iterations=2, early_stop=0.0)
        assert found.evaluations == 2 * (3 + 2) and found.iterations == [2, 2, 0]
        assert torch.equal(found.embeddings[2], found.embeddings[1])

    @pytest.mark.parametrize(
        ("mode", "evaluations", "backwards"),
        [
            ("global", STEPS + 3 * STEPS, 3 * STEPS),
            ("no_pivot", 2 * 3 * STEPS, 3 * STEPS),
            ("prompt_no_pivot", 2 * 3 * STEPS, 3 * STEPS),
            ("random_pivot", STEPS * (3 + 3), 3 * STEPS),
            ("prompt", STEPS * (3 + 3), 3 * STEPS),
        ],
    )
    def test_ablations(self, mode: Any, evaluations: int, backwards: int) -> None:
        this = case()
        found = this.optimise(mode=mode, iterations=3, early_stop=0.0)
        assert (found.evaluations, found.backwards) == (evaluations, backwards)
        assert this.model.backwards == backwards


@pytest.mark.rounding
@pytest.mark.parametrize("parity", [True, False])
def test_images_of_a_batch_are_optimised_as_if_alone(parity: bool) -> None:
    this = case(images=3)
    both = this.optimise(parity=parity, early_stop=3e-4)
    assert len({int((loss < 3e-4).sum()) for loss in both.losses}) > 1  # they stop at different times
    for b in range(3):
        single = replace(this, trajectory=replace(this.trajectory, latents=this.trajectory.latents[:, b : b + 1]))
        alone = single.optimise(parity=parity, early_stop=3e-4)
        # Ten inner steps each, of about as many roundings.
        assert_trained_alike(both.embeddings[:, b : b + 1], alone.embeddings, STEPS * 10 * 10)


def test_global_is_one_embedding_and_worse_than_one_per_step() -> None:
    this = case()
    one, each = (this.optimise(mode=m, iterations=20, early_stop=0.0) for m in ("global", "pivotal"))
    assert torch.equal(one.embeddings, one.embeddings[:1].expand_as(one.embeddings))
    assert error(this, this.plain()) > error(this, this.back(one)) > error(this, this.back(each))


def test_prompt_modes_change_the_other_embedding() -> None:
    this = case()
    found = this.optimise(mode="prompt", iterations=60, early_stop=0.0)
    assert found.replaces == "cond"
    assert error(this, this.back(found)) < 0.1 * error(this, this.plain())


def test_random_pivots_start_at_their_own_noise() -> None:
    this = case()
    found, again, other = (this.optimise(mode="random_pivot", iterations=1, seed=s) for s in (1, 1, 2))
    assert torch.equal(found.start, again.start) and torch.equal(found.embeddings, again.embeddings)
    assert not torch.equal(found.start, other.start)
    sigma = float(this.trajectory.sigmas[0])
    noise = torch.randn(this.trajectory.noise.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.start, this.trajectory.source + sigma * noise)


def problem(steps: int, settings: NullTextSettings) -> Optimisation:
    nothing = Mean(torch.zeros(1))
    return Optimisation(case().model, nothing, nothing, [1.0] * (steps + 1), settings)


def test_the_schedule_of_the_reference() -> None:
    """Rate 0.01 (1 - i / 100), threshold 1e-5 + 2e-5 i, over 50 steps; the default stretches it over any number."""
    ours = NullTextSettings(SCALE)
    for i in range(50):
        for settings in (ours.reference(), ours):
            assert problem(50, settings).rate(i) == pytest.approx(0.01 * (1 - i / 100))
            assert problem(50, settings).threshold(i) == pytest.approx(1e-5 + i * 2e-5)
    assert problem(25, ours.reference()).rate(24) == pytest.approx(0.0076)
    assert problem(25, ours).rate(24) == pytest.approx(0.0052)
    assert problem(50, replace(ours, early_stop=0.0)).threshold(40) == 0
    assert problem(25, ours).threshold(24) == pytest.approx(problem(50, ours).threshold(48))


def test_the_reference_is_a_preset() -> None:
    ours = NullTextSettings(4.0, iterations=3, seed=5)
    assert ours.reference() == replace(ours, loop="reference", schedule_steps=50)
    assert ours.quick and ours.starts_at_prompt
    assert not ours.reference().quick and not ours.reference().starts_at_prompt
    assert not replace(ours, start="uncond").starts_at_prompt
    assert [mode for mode in MODES if NullTextSettings(4.0, mode).quick] == ["pivotal"]
    assert [mode for mode in MODES if NullTextSettings(4.0, mode).changes_prompt] == ["prompt", "prompt_no_pivot"]


@pytest.mark.parametrize("enabled", [False, True])
def test_losses_leave_the_grad_mode_of_the_caller_as_it_was(enabled: bool) -> None:
    this = case()
    task = Optimisation(this.model, this.cond, this.uncond, this.trajectory.sigmas.tolist(), NullTextSettings(SCALE))
    x, target = this.trajectory.latents[:2]
    with torch.set_grad_enabled(enabled):
        fixed = this.model.denoised(x, task.levels[0], this.cond)
        varied, losses = task.losses(0, x, fixed, target, task.embedding(1))
        assert torch.is_grad_enabled() == enabled
    assert varied.requires_grad and losses.requires_grad  # with a graph in either case


def test_the_report_of_an_optimisation() -> None:
    this = case(images=2)
    found = this.optimise(iterations=3, early_stop=0.0)
    lines = found.text(321).splitlines()
    assert lines[0] == f"pivotal, {STEPS} steps, 2 image(s), guidance 7.5"
    assert lines[1] == f"return, latent   {found.latent_psnr:6.2f} dB PSNR"
    assert lines[2].startswith(f"{found.evaluations} network evaluations, {found.backwards} backward passes, ")
    average, most = sum(found.iterations) / STEPS, max(found.iterations)
    assert lines[3] == f"iterations per step: {average:.1f} on average, {most} at most"
    left = max(float(loss.amin(dim=0).max()) for loss in found.losses)
    assert lines[4:] == [f"largest loss that a step was left with {left:.1e}", "peak memory 321 MB"]


def test_stopping_passes_through() -> None:
    class Stop(BaseException):
        pass

    this = case()

    def stop(step: int) -> None:
        raise Stop

    this.model.on_progress = stop
    with pytest.raises(Stop):
        this.optimise()


def test_progress_and_callback() -> None:
    this = case()
    this.model.steps.clear()
    seen: list[NullTextStep] = []
    found = this.optimise(callback=seen.append)
    assert [done.step for done in seen] == list(range(1, STEPS + 1)) and {done.total for done in seen} == {STEPS}
    assert [done.iterations for done in seen] == found.iterations
    assert [done.loss for done in seen] == [float(losses[-1].max()) for losses in found.losses]
    assert seen[-1].psnr == pytest.approx(found.latent_psnr)
    assert this.model.steps[-1] == (STEPS, STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "null"}, f"one of {', '.join(MODES)}"),
        ({"start": "null"}, "one of cond, uncond"),
        ({"loop": "null"}, "one of quick, reference"),
        ({"iterations": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"early_stop": -1.0}, "0 or more"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        NullTextSettings(**options)


def test_guidance_without_influence() -> None:
    none: list[tuple[Mode, float]] = [("pivotal", 1.0), ("prompt", 0.0), ("pivotal", math.nan)]
    for mode, scale in none:
        with pytest.raises(InvalidSetting, match="no influence"):
            NullTextSettings(scale, mode)


def test_trajectories_that_do_not_fit() -> None:
    this = case()
    with pytest.raises(TrajectoryMismatch, match="kind 'v'"):
        replace(this, trajectory=replace(this.trajectory, parametrisation="v")).optimise()
    long = case(sigmas=ladder(101, 10.0, 2.0).float())
    with pytest.raises(InvalidSchedule, match="learning rate reaches 0"):
        long.optimise(parity=True)


def test_a_broken_model_is_an_error() -> None:
    this = case()
    this.model.std = this.model.std * math.nan
    with pytest.raises(RetraceError, match="NaN"):
        this.optimise(iterations=1)


@pytest.mark.parametrize("parity", [False, True])
def test_an_optimisation_that_breaks_is_an_error(parity: bool) -> None:
    """As a model in fp16 may: the estimates are fine, those with gradients are not."""
    this = case()
    denoised = this.model.denoised

    def broken(x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
        estimate = denoised(x, sigma, cond)
        return estimate * math.nan if cond.embedding.requires_grad else estimate

    this.model.denoised = broken  # type: ignore[method-assign]
    with pytest.raises(RetraceError, match="NaN"):
        this.optimise(iterations=2, early_stop=0.0, parity=parity)
