"""CLIP guidance: its losses by known values, what the CLIP sees, and the move that a gradient makes."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retrace.clip_guidance import (
    Augmentations,
    ClipGuidance,
    GuidedRun,
    Look,
    Schedule,
    Weights,
    background_mse,
    linear_decoder,
    range_loss,
    spherical_distance,
)
from retrace.clip_guidance.decoders import pixels
from retrace.clip_guidance.losses import reference_background_mse
from retrace.clip_guidance.views import reference_views, views
from retrace.core.errors import InvalidImage, InvalidSetting, RetraceError, UnsupportedModel
from retrace.core.sampling import ancestral_step, ddim_step
from retrace.models.clip.model import ImageTextModel

pytestmark = pytest.mark.rounding

SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])


class Eye:
    """The image side of a CLIP: a fixed linear map of the mean colour; it counts what it is shown."""

    image_size = 8

    def __init__(self) -> None:
        self.shown: list[Tensor] = []


def stand_in() -> tuple[ImageTextModel, Eye]:
    """A CLIP whose embedding of a picture is its mean colour, and of any text pure blue."""
    eye = Eye()

    def encode_image(x: Tensor) -> Tensor:
        eye.shown.append(x.detach())
        return x.mean((2, 3))

    model = SimpleNamespace(
        visual=eye,
        encode_image=encode_image,
        encode_text=lambda ids: torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(ids), 1),
        parameters=lambda: iter([torch.zeros(1)]),
    )
    clip = ImageTextModel(
        model, lambda texts: torch.zeros(len(texts), 77, dtype=torch.long), "eye", (0, 0, 0), (1, 1, 1)
    )
    return clip, eye


def guidance(**changes: Any) -> ClipGuidance:
    given: dict[str, Any] = {"weights": Weights(clip=1.0, range=0.0), "augmentations": Augmentations(1), **changes}
    return ClipGuidance(stand_in()[0], "blue", **given)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestLosses:
    def test_spherical_distance_of_known_angles(self) -> None:
        angles = torch.tensor([0.0, 0.1, math.pi / 2, 3.0], dtype=torch.float64)
        a = torch.tensor([1.0, 0.0], dtype=torch.float64)
        b = torch.stack([angles.cos(), angles.sin()], dim=-1)
        assert torch.allclose(spherical_distance(a, b), angles.square() / 2, atol=1e-9)

    def test_its_gradient_is_finite_where_the_vectors_agree_and_oppose(self) -> None:
        for other in ([2.0, 0.0], [-1.0, 0.0]):
            a = torch.tensor([1.0, 0.0], requires_grad=True)
            spherical_distance(a, torch.tensor(other)).backward()
            assert a.grad is not None and bool(torch.isfinite(a.grad).all())

    def test_range_loss_is_the_mean_squared_excess(self) -> None:
        picture = torch.zeros(2, 3, 4, 4)
        picture[1, 0, 0, 0] = -3.0
        assert range_loss(picture).tolist() == pytest.approx([0.0, 4 / 48])

    def test_background_counts_outside_the_mask_only(self) -> None:
        picture, source, mask = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
        mask[..., :2] = 1
        assert float(background_mse(picture, source, mask)) == pytest.approx(0.5)
        # The authors' code: mean((x (1 - m) - init)^2), with init as it is.
        source += 0.5
        assert float(background_mse(picture, source, mask)) == pytest.approx(0.125)
        assert float(reference_background_mse(picture, source, mask)) == pytest.approx(0.25)


class TestViews:
    def test_plain_first_then_the_others_picture_by_picture(self) -> None:
        batch = torch.stack([torch.full((3, 8, 8), v) for v in (0.25, 0.75)])
        seen = Augmentations(4, perspective=0.0)(batch, generator())
        assert seen.shape == (8, 3, 8, 8) and torch.equal(seen[:2], batch)
        assert torch.allclose(seen[2::2], torch.tensor(0.25)) and torch.allclose(seen[3::2], torch.tensor(0.75))

    def test_the_seed_decides_and_the_global_state_is_left_alone(self) -> None:
        batch = torch.rand(1, 3, 16, 16)
        before = torch.random.get_rng_state()
        one, two = (Augmentations(4)(batch, generator()) for _ in range(2))
        assert torch.equal(one, two) and torch.equal(torch.random.get_rng_state(), before)
        assert not torch.equal(one[1], one[2])
        assert not torch.equal(one, Augmentations(4)(batch, torch.Generator().manual_seed(1)))

    def test_outside_the_mask_is_grey_and_the_mask_moves_with_the_picture(self) -> None:
        picture = torch.ones(1, 3, 32, 32)
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        seen = views(picture, mask, (32, 32), Augmentations(6, probability=1.0), generator())
        assert torch.equal(seen[0], mask[0].expand(3, -1, -1))
        for view in seen[1:]:
            share = float((view > 0.5).float().mean())
            assert 0.02 < share < 0.35 and not torch.equal(view, seen[0])

    def test_pictures_of_any_size_become_the_clips(self) -> None:
        for see in (views, reference_views):
            assert see(torch.rand(2, 3, 40, 24), None, (8, 8), Augmentations(1), generator()).shape == (2, 3, 8, 8)

    def test_the_reference_masks_first_and_shrinks_by_averaging(self) -> None:
        picture = torch.rand(1, 3, 16, 16, generator=generator())
        mask = (torch.rand(1, 1, 16, 16, generator=generator()) > 0.5).float()
        seen = reference_views(picture, mask, (8, 8), Augmentations(1), generator())
        assert torch.allclose(seen, F.avg_pool2d(picture * mask, 2), atol=1e-6)


class TestGuidance:
    def test_loss_is_the_mean_over_the_views_and_apart_for_each_picture(self) -> None:
        both = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
        g = guidance(weights=Weights(clip=10.0, range=3.0))
        loss = g.loss(both, g.words(), generator())
        alone = torch.cat([g.loss(one[None], g.words(), generator()) for one in both])
        colour = F.normalize((both / 2 + 0.5).mean((2, 3)), dim=-1)
        by_hand = 10 * spherical_distance(colour, torch.tensor([0.0, 0.0, 1.0])) + 3 * range_loss(both)
        assert torch.allclose(loss, by_hand, atol=1e-6) and torch.allclose(loss, alone, atol=1e-6)

    def test_gradient_turns_the_region_blue_and_leaves_the_rest(self) -> None:
        mask = torch.zeros(1, 8, 8)
        mask[:, 2:5, 2:5] = 1
        picture = torch.zeros(1, 3, 8, 8, requires_grad=True)
        g = guidance(mask=mask)
        (gradient,) = torch.autograd.grad(g.loss(picture, g.words(), generator()).sum(), picture)
        assert bool((gradient[0, 2, 2:5, 2:5] < 0).all()) and bool((gradient[0, :2, 2:5, 2:5] > 0).all())
        assert not bool(gradient[..., mask[0] == 0].any())

    def test_background_weights(self) -> None:
        mask, source = torch.zeros(1, 8, 8), torch.full((1, 8, 8, 3), 0.75)
        mask[:, :4] = 1
        g = guidance(mask=mask, source=source, weights=Weights(clip=0.0, range=0.0, background_mse=100.0))
        assert float(g.loss(torch.zeros(1, 3, 8, 8), g.words(), generator())) == pytest.approx(100 * 0.5**2 / 2)
        seen: list[Tensor] = []

        def distance(a: Tensor, b: Tensor) -> Tensor:
            seen.extend([a, b])
            return (a - b).square().sum((1, 2, 3))

        network = SimpleNamespace(to=lambda _: distance)
        g = guidance(
            mask=mask, source=source, weights=Weights(clip=0.0, range=0.0, background_lpips=2.0), lpips=network
        )
        assert float(g.loss(torch.zeros(1, 3, 8, 8), g.words(), generator())) == pytest.approx(2 * 0.25 * 3 * 32)
        assert all(not bool(t[..., :4, :].any()) for t in seen)

    def test_picture_view_shows_everything(self) -> None:
        mask = torch.zeros(1, 8, 8)
        mask[:, :4] = 1
        clip, eye = stand_in()
        for view, shown in (("region", 0.75), ("picture", 1.0)):
            g = ClipGuidance(clip, "blue", mask, view=view, augmentations=Augmentations(1))  # type: ignore[arg-type]
            g.loss(torch.ones(1, 3, 8, 8), g.words(), generator())
            assert float(eye.shown[-1].mean()) == pytest.approx(shown)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"prompt": "  "}, "empty"),
            ({"mask": torch.zeros(1, 8, 8)}, "mask"),
            ({"mask": torch.ones(1, 8, 8), "source": torch.zeros(1, 9, 8, 3)}, "same height"),
            ({"weights": Weights(clip=1, range=1, background_mse=1)}, "background"),
            ({"weights": Weights(clip=0, range=0)}, "nothing to guide"),
            (
                {
                    "mask": torch.ones(1, 8, 8),
                    "source": torch.zeros(1, 8, 8, 3),
                    "weights": Weights(clip=1, range=1, background_lpips=1),
                },
                "LPIPS",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(RetraceError, match=says):
            ClipGuidance(stand_in()[0], changes.pop("prompt", "blue"), **changes)

    def test_masks_and_sources_for_another_batch(self) -> None:
        g = guidance(mask=torch.ones(3, 8, 8))
        with pytest.raises(InvalidImage, match="3 masks for a batch of 2"):
            g.loss(torch.zeros(2, 3, 8, 8), g.words(), generator())
        g = guidance(
            mask=torch.ones(1, 8, 8), source=torch.zeros(3, 8, 8, 3), weights=Weights(clip=0, range=0, background_mse=1)
        )
        with pytest.raises(InvalidImage, match="3 sources for a batch of 2"):
            g.loss(torch.zeros(2, 3, 8, 8), g.words(), generator())

    def test_made_in_inference_mode_it_still_takes_gradients(self) -> None:
        with torch.inference_mode():
            g = guidance(mask=torch.ones(1, 8, 8), source=torch.rand(1, 8, 8, 3))
        assert g.mask is not None and not g.mask.is_inference()
        picture = torch.zeros(1, 3, 8, 8, requires_grad=True)
        g.loss(picture, g.words(), generator()).sum().backward()

    def test_what_resizing_overshot_is_cut(self) -> None:
        assert float(guidance(mask=torch.full((1, 8, 8), 1.2)).mask.max()) == 1.0  # type: ignore[union-attr]


class TestSchedule:
    def test_levels_and_every(self) -> None:
        assert Schedule().guides(SIGMAS) == [True] * 5
        assert Schedule(first=4.0, last=1.0).guides(SIGMAS) == [False, True, True, True, False]
        assert Schedule(first=4.0, every=2).guides(SIGMAS) == [False, True, False, True, False]

    @pytest.mark.parametrize("wrong", [{"path": "both"}, {"every": 0}, {"dsg": -0.1}, {"move": "far"}])
    def test_wrong_settings(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidSetting):
            Schedule(**wrong)


def run(schedule: Schedule, kind: Any = "eps", g: ClipGuidance | None = None) -> GuidedRun:
    return GuidedRun(g or guidance(), schedule, SIGMAS, pixels, contextlib.nullcontext, kind)


def shrink(x: Tensor) -> Tensor:
    """A network: the clean estimate of data with unit variance at noise level 2."""
    return x / 5


class TestStep:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradient(self, at: Tensor, through: Any) -> Tensor:
        g = guidance()
        own = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(g.loss(through(own), g.words(), generator()).sum(), own)
        return gradient

    def test_full_is_the_score_of_the_noisy_latent(self) -> None:
        """DDIM with a changed noise, Dhariwal & Nichol 2021, algorithm 2: eps - sqrt(1 - alpha_bar) g, g = -dL/dx_t."""
        sigma, sigma_next = 2.0, 1.0
        with torch.enable_grad():
            moved = run(Schedule("full")).guide(self.x, sigma, shrink)
        abar, abar_next = (1 / (1 + s * s) for s in (sigma, sigma_next))
        x_t = self.x * math.sqrt(abar)
        g = -self.gradient(x_t, lambda y: shrink(y / math.sqrt(abar)))
        eps = (x_t - math.sqrt(abar) * shrink(self.x)) / math.sqrt(1 - abar) - math.sqrt(1 - abar) * g
        x0 = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        after = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * eps
        ours = ddim_step(self.x, moved, sigma, sigma_next) * math.sqrt(abar_next)
        assert torch.allclose(ours, after, atol=1e-6)

    def test_full_of_a_flow_model_follows_tweedie(self) -> None:
        with torch.enable_grad():
            moved = run(Schedule("full"), "flow").guide(self.x, 0.5, shrink)
        assert torch.allclose(moved, shrink(self.x) - 0.5 * self.gradient(self.x, shrink), atol=1e-6)

    def test_x0_and_full_agree_where_the_data_is_gaussian(self) -> None:
        """There sigma^2 times the Jacobian of D is the posterior's covariance itself, which x0 has on average."""
        with torch.enable_grad():
            full = run(Schedule("full")).guide(self.x, 2.0, shrink)
        x0 = run(Schedule("x0")).guide(self.x, 2.0, shrink)
        assert torch.allclose(full, x0, atol=1e-6) and not torch.allclose(x0, shrink(self.x), atol=1e-6)

    @pytest.mark.parametrize("path", ["x0", "full"])
    def test_one_prediction_and_one_backward_pass_per_guided_step(self, path: Any) -> None:
        calls: list[bool] = []

        def predict(x: Tensor) -> Tensor:
            calls.append(x.requires_grad)
            return shrink(x)

        this = run(Schedule(path, every=2))
        with torch.enable_grad():
            for sigma in SIGMAS[:-1].tolist():
                this.guide(self.x, sigma, predict)
        assert calls == [path == "full" and i % 2 == 0 for i in range(5)]
        assert this.backwards == (2 * 3 if path == "full" else 0) and len(this.losses) == 3

    def test_unguided_steps_give_the_prediction_itself(self) -> None:
        answer = torch.rand(2, 3, 8, 8)
        assert run(Schedule(first=1.0)).guide(self.x, 4.0, lambda _: answer) is answer

    @pytest.mark.parametrize("path", ["x0", "full"])
    def test_dsg_moves_the_next_latent_by_its_share_of_ddpms_noise(self, path: Any) -> None:
        sigma, sigma_next = 2.0, 1.0
        with torch.enable_grad():
            moved = run(Schedule(path, dsg=0.2)).guide(self.x, sigma, shrink)
        down = sigma_next**2 / sigma
        steps = [ddim_step(self.x, d, sigma, down) for d in (moved, shrink(self.x))]
        noise = math.sqrt(sigma_next**2 - down**2) * math.sqrt(self.x[0].numel())
        assert torch.allclose((steps[0] - steps[1]).flatten(1).norm(dim=1), torch.tensor(0.2 * noise), rtol=1e-5)

    def test_the_reference_shows_the_mix_of_clean_and_noisy(self) -> None:
        clip, eye = stand_in()
        g = ClipGuidance(clip, "blue", augmentations=Augmentations(1), look=Look.reference())
        with torch.enable_grad():
            run(Schedule("full"), g=g).guide(self.x, 2.0, shrink)
        f, x_t = math.sqrt(0.8), self.x / math.sqrt(5)
        assert torch.allclose(eye.shown[-1] * 2 - 1, f * shrink(self.x) + (1 - f) * x_t, atol=1e-6)

    @pytest.mark.parametrize("path", ["x0", "full"])
    @pytest.mark.parametrize("t", [990, 500, 110, 20, 10])
    def test_the_references_mean_moves_by_the_variance_of_the_step(self, path: Any, t: int) -> None:
        """DDPM on every tenth of 1000 linear betas: the mean of p(x_{t-1} | x_t) plus its variance times g."""
        x = self.x.double()
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        bars = (1 - betas).cumprod(0)
        abar, before = float(bars[t]), float(bars[t - 10])
        beta = 1 - abar / before
        sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (abar, before))
        levels = torch.tensor([sigma, sigma_next, 0.0])

        def mean_moves(schedule: Schedule) -> Tensor:
            this = GuidedRun(guidance(), schedule, levels, pixels, contextlib.nullcontext, "eps")
            with torch.enable_grad():
                guided = this.guide(x, sigma, shrink)
            means = [ancestral_step(x, d, sigma, sigma_next, x * 0, "eps") for d in (guided, shrink(x))]
            return (means[0] - means[1]) * math.sqrt(before)

        if path == "full":
            g = -self.gradient(x * math.sqrt(abar), lambda y: shrink(y / math.sqrt(abar)))
        else:  # the estimate's own gradient, with sigma^2 / (1 + sigma^2) standing in for the network's Jacobian
            g = -self.gradient(shrink(x), lambda y: y) / (1 + sigma**2) / math.sqrt(abar)
        variance = beta * (1 - before) / (1 - abar)
        assert torch.allclose(mean_moves(Schedule(path, move="variance")), variance * g, rtol=2e-3, atol=1e-9)
        ours = beta / math.sqrt(1 - beta)
        assert torch.allclose(mean_moves(Schedule(path)), ours * g, rtol=2e-3, atol=1e-9)
        assert ours / variance == pytest.approx({990: 1.22, 500: 1.09, 110: 1.19, 20: 2.86, 10: 22.0}[t], rel=0.1)

    def test_the_references_last_step_is_not_moved(self) -> None:
        assert Schedule.reference() == Schedule("full", move="variance")
        moved = run(Schedule(move="variance")).guide(self.x, 0.5, shrink)
        assert torch.equal(moved, shrink(self.x))

    def test_two_guidances_around_one_model_both_count(self) -> None:
        """As two nodes in a row: the outer one's gradient passes through what the inner one left of the estimate."""
        for outer, inner in (("full", "full"), ("full", "x0"), ("x0", "full"), ("x0", "x0")):
            one, two = run(Schedule(outer)), run(Schedule(inner))  # type: ignore[arg-type]
            with torch.enable_grad():
                both = one.guide(self.x, 2.0, lambda y, two=two: two.guide(y, 2.0, shrink))  # type: ignore[misc]
                alone = run(Schedule(inner)).guide(self.x, 2.0, shrink)  # type: ignore[arg-type]
            assert not both.requires_grad and not torch.allclose(both, alone, atol=1e-6)

    def test_without_a_gradient_through_the_model(self) -> None:
        with torch.enable_grad(), pytest.raises(RetraceError, match="no gradient comes through"):
            run(Schedule("full")).guide(self.x, 2.0, lambda y: y.detach() / 5)

    def test_pure_noise_of_a_flow_model_is_not_guided(self) -> None:
        this = GuidedRun(
            guidance(), Schedule("full"), torch.tensor([1.0, 0.5, 0]), pixels, contextlib.nullcontext, "flow"
        )
        assert torch.equal(this.guide(self.x, 1.0, shrink), shrink(self.x))

    def test_upwards_nothing_is_guided(self) -> None:
        up = GuidedRun(guidance(), Schedule(), SIGMAS.flip(0), pixels, contextlib.nullcontext, "eps")
        assert not any(up.guided)

    def test_the_samplers_sigmas_are_copied(self) -> None:
        sigmas = SIGMAS.clone()
        this = GuidedRun(guidance(), Schedule(), sigmas, pixels, contextlib.nullcontext, "eps")
        sigmas[-1] = 0.001  # uni_pc does that
        assert float(this.sigmas[-1]) == 0

    def test_dsg_between_two_levels_is_that_of_their_step(self) -> None:
        moves = [shrink(self.x) - run(Schedule(dsg=0.2)).guide(self.x, s, shrink) for s in (4.0, 2.001)]
        assert torch.allclose(moves[0].flatten(1).norm(dim=1), moves[1].flatten(1).norm(dim=1), rtol=1e-5)

    def test_nan_is_refused(self) -> None:
        with pytest.raises(RetraceError, match="NaN"):
            run(Schedule()).guide(self.x, 2.0, lambda x: x * math.nan)


def test_linear_decoder() -> None:
    factors = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
    decode = linear_decoder(factors, torch.tensor([0.0, 0.0, 0.5]))
    picture = decode(torch.ones(1, 2, 3, 3))
    assert picture.shape == (1, 3, 3, 3) and picture[0, :, 0, 0].tolist() == [1.0, 2.0, 0.5]
    with pytest.raises(UnsupportedModel, match="Pass a VAE"):
        decode(torch.ones(1, 4, 3, 3))
