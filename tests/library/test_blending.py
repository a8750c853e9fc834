"""Blend: the outside follows the source at the right noise level, whatever the mask, noise and schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.blending.blend import Blend, BlendSettings, keep_source
from retrace.blending.pixels import PixelBlending
from retrace.blending.sample import Sampling, first_latent, sample_blended
from retrace.core.errors import InvalidImage, InvalidInput, InvalidSchedule, InvalidSetting, TrajectoryMismatch
from retrace.core.schedule import reference_sigmas, step_of
from retrace.core.trajectory import Trajectory

pytestmark = pytest.mark.rounding

SIGMAS = torch.tensor([10.0, 4.0, 1.0, 0.0])


def source(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 6, 8, generator=torch.Generator().manual_seed(1))


def half_mask(height: int = 6, width: int = 8) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, :, :4] = 1
    return mask


def training_sigmas() -> torch.Tensor:
    """Of SD 1.x and 2.x: betas 0.00085..0.012, linear in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas).sqrt()


class Keeps:
    """A model whose clean estimate is its condition."""

    parametrisation, device, evaluations = "eps", torch.device("cpu"), 0

    def denoised(self, x: torch.Tensor, sigma: float, cond: torch.Tensor) -> torch.Tensor:
        return cond

    def progress(self, *_: object) -> None: ...


def painted_with(x0: torch.Tensor, sigmas: torch.Tensor, blend: Blend, aim: Any, *, settings: Sampling) -> torch.Tensor:
    """What a model whose every estimate is ``aim`` paints."""
    model: Any = Keeps()
    return sample_blended(model, x0, sigmas, blend, aim, settings=settings)


def trajectory() -> Trajectory:
    latents = torch.stack([source() + i for i in (3.0, 2.0, 1.0, 0.0)])
    return Trajectory(SIGMAS, latents, "eps", "abc", "ddim")


def test_next_level_is_the_source_at_the_noise_level_of_the_step() -> None:
    x = torch.zeros(1, 4, 6, 8)
    run = Blend(source(), half_mask(), "eps", BlendSettings(seed=3)).start(SIGMAS, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    out = run(x, 4.0)
    assert torch.equal(out[..., :4], x[..., :4])
    torch.testing.assert_close(out[..., 4:], (source() + 4.0 * noise)[..., 4:])


def test_current_level_is_one_step_noisier_as_in_the_reference_code() -> None:
    x = torch.zeros(1, 4, 6, 8)
    run = Blend(source(), torch.zeros(1, 6, 8), "eps", BlendSettings(level="current", seed=3)).start(SIGMAS, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    # The authors' code pastes the variance-preserving latent of the noisier level (4) into that of the lower one (1).
    pasted = (source() + 4.0 * noise) / 17**0.5
    torch.testing.assert_close(run(x, 1.0) / 2**0.5, pasted)
    torch.testing.assert_close(run(x, 10.0), source() + 10.0 * noise)  # there is no noisier level to take


def test_flow_models_interpolate() -> None:
    x = torch.zeros(1, 4, 6, 8)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    run = Blend(source(), torch.zeros(1, 6, 8), "flow", BlendSettings(seed=3)).start(sigmas, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(x, 0.5), 0.5 * source() + 0.5 * noise)


def test_fixed_noise_stays_and_fresh_noise_changes() -> None:
    x = torch.zeros(1, 4, 6, 8)
    fixed = Blend(source(), torch.zeros(1, 6, 8), "eps", BlendSettings(noise="fixed")).start(SIGMAS, x)
    fresh = Blend(source(), torch.zeros(1, 6, 8), "eps", BlendSettings(noise="fresh")).start(SIGMAS, x)
    assert torch.equal(fixed(x, 4.0), fixed(x, 4.0))
    assert not torch.equal(fresh(x, 4.0), fresh(x, 4.0))


def test_the_same_seed_gives_the_same_run_and_leaves_the_global_generator_alone() -> None:
    x = torch.zeros(1, 4, 6, 8)
    before = torch.get_rng_state()
    blend = Blend(source(), half_mask(), "eps", BlendSettings(noise="fresh", seed=7))
    first, second = (blend.start(SIGMAS, x)(x, 4.0) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trajectory_needs_no_noise() -> None:
    x = torch.zeros(1, 4, 6, 8)
    run = Blend(trajectory(), torch.zeros(1, 6, 8), "eps", BlendSettings(noise="trajectory")).start(SIGMAS, x)
    torch.testing.assert_close(run(x, 10.0), source() + 3)
    torch.testing.assert_close(run(x, 1.0), source() + 1)
    torch.testing.assert_close(run.finish(x), source())
    torch.testing.assert_close(run(x, 2.5), source() + 1.5)  # between the levels: the straight line of an Euler step
    with pytest.raises(TrajectoryMismatch, match=r"12\.0000.*from 10\.0000 down to 0\.0000.*same scheduler"):
        run(x, 12.0)


def test_soft_masks_mix_linearly() -> None:
    x = torch.ones(1, 4, 6, 8)
    run = Blend(source(), torch.full((1, 6, 8), 0.25), "eps").start(SIGMAS, x)
    torch.testing.assert_close(run.finish(x), 0.25 * x + 0.75 * source())


def test_a_second_mask_keeps_more() -> None:
    x = torch.full((2, 4, 6, 8), 5.0)
    run = Blend(source(), half_mask(), "eps").start(SIGMAS, x)
    top = torch.zeros(2, 1, 6, 8)
    top[:, :, :3] = 1
    run.restrict(top)
    out = run.finish(x)
    assert torch.equal(out[:, :, :3, :4], x[:, :, :3, :4])
    assert torch.equal(out[:, :, 3:], source()[:, :, 3:].expand(2, -1, -1, -1))
    assert torch.equal(out[..., 4:], source()[..., 4:].expand(2, -1, -1, -1))


def test_shrinking_masks_start_wide_and_end_exact() -> None:
    mask = torch.zeros(1, 6, 8)
    mask[0, 3, 4] = 1
    sigmas = torch.linspace(10, 0, 51)
    x = torch.full((1, 4, 6, 8), 1e6)
    run = Blend(source(), mask, "eps", BlendSettings(stages=2)).start(sigmas, x)
    changed = [int((run(x, float(s))[0, 0] > 1e5).sum()) for s in sigmas[:-1]]
    assert changed[0] == 25
    assert changed[-1] == 1
    assert changed == sorted(changed, reverse=True)
    assert int((run.finish(x)[0, 0] > 1e5).sum()) == 1


@pytest.mark.parametrize("mask, same", [(torch.ones(1, 6, 8), "edit"), (torch.zeros(1, 6, 8), "source")])
def test_all_or_nothing(mask: torch.Tensor, same: str) -> None:
    x = torch.full((2, 4, 6, 8), 5.0)
    run = Blend(source(), mask, "eps").start(SIGMAS, x)
    out = run.finish(run(x, 1.0) * 0 + x)
    assert torch.equal(out, x if same == "edit" else source().expand_as(x))


def test_between_the_levels_the_step_is_the_one_that_runs() -> None:
    assert [step_of(SIGMAS, s) for s in (10.0, 7.0, 4.0, 2.0, 1.0, 0.5, 0.0)] == [0, 0, 1, 1, 2, 2, 2]


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"noise: 'trajectory'.*Pass the trajectory"):
        keep_source(source(), half_mask(), "eps", BlendSettings(noise="trajectory"))
    with pytest.raises(InvalidImage, match=r"mask: got.*64x48 is needed"):
        keep_source(source(), torch.ones(1, 50, 80), "eps")
    with pytest.raises(InvalidImage, match="0 everywhere"):
        keep_source(source(), torch.zeros(1, 48, 64), "eps")
    with pytest.raises(InvalidImage, match="batch dimension is missing"):
        keep_source(source(), torch.ones(48, 64), "eps")
    with pytest.raises(InvalidImage, match="NaN"):
        keep_source(source() * float("nan"), half_mask(), "eps")
    for wrong in ({"noise": "old"}, {"level": "last"}, {"cells": "most"}, {"noise_for": "all"}, {"stages": -1}):
        with pytest.raises(InvalidSetting, match=f"{next(iter(wrong))}: got"):
            BlendSettings(**wrong)
    with pytest.raises(InvalidImage, match="Sample at the size of the source"):
        Blend(source(), half_mask(), "eps").start(SIGMAS, torch.zeros(1, 4, 8, 8))
    with pytest.raises(InvalidImage, match="2 masks for a batch of 3"):
        Blend(source(), half_mask().repeat(2, 1, 1), "eps").start(SIGMAS, torch.zeros(3, 4, 6, 8))
    with pytest.raises(InvalidSchedule, match="two noise levels"):
        Blend(source(), half_mask(), "eps").start(torch.tensor([1.0]), torch.zeros(1, 4, 6, 8))


def test_sampling_paints_inside_the_mask_and_returns_the_source_outside() -> None:
    blend = Blend(source(), half_mask(), "eps")
    painted = torch.full((1, 4, 6, 8), 2.0)
    out = painted_with(painted, SIGMAS, blend, torch.full_like(painted, 5.0), settings=Sampling(20.0))
    assert torch.equal(out[..., :4], torch.full((1, 4, 6, 4), 5.0))
    assert torch.equal(out[..., 4:], source()[..., 4:])


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_a_closing_step_between_equal_levels_still_ends_on_the_background_of_that_level(noise: Any) -> None:
    """The grid of the reference for SD2 (``leading_0`` to the letter): there the background keeps a std of 0.029."""
    sigmas = reference_sigmas("leading_0", training_sigmas(), 10)
    assert sigmas[-1] == sigmas[-2] > 0
    blend = Blend(torch.zeros(1, 4, 32, 32), half_mask(32, 32), "eps", BlendSettings(noise=noise, level="current"))
    x0 = torch.zeros(1, 4, 32, 32)
    out = painted_with(x0, sigmas, blend, torch.full_like(x0, 5.0), settings=Sampling(20.0))
    lowest = float(sigmas[-1])
    assert lowest == pytest.approx(0.029, abs=5e-4)
    assert float(out[..., 4:].std()) == pytest.approx(lowest, rel=0.05)


def test_a_mask_in_pixels_or_on_the_grid_becomes_the_same_blend() -> None:
    wide = half_mask().repeat_interleave(8, 1).repeat_interleave(8, 2)
    for cells in ("max", "area", "any", "nearest"):
        blend = keep_source(source(), wide, "eps", BlendSettings(cells=cells))
        assert torch.equal(blend.mask, half_mask())
    assert torch.equal(keep_source(trajectory(), half_mask(), "eps").mask, half_mask())
    # A VAE cuts 53x67 pixels to 48x64, two rows and one column from the beginning.
    cut = torch.zeros(1, 53, 67)
    cut[:, 2:50, 1:33] = 1
    assert torch.equal(keep_source(source(), cut, "eps").mask, half_mask())


class TestReferences:
    """What the authors' scripts do and our defaults do not."""

    def test_presets(self) -> None:
        pixel, ldm, sd2 = (BlendSettings.reference(script) for script in ("pixel", "ldm", "sd2"))
        assert {s.noise for s in (pixel, ldm, sd2)} == {"fresh"} and {s.cells for s in (pixel, ldm, sd2)} == {"nearest"}
        assert [s.level for s in (pixel, ldm, sd2)] == ["current", "next", "current"]
        assert [s.noise_for for s in (pixel, ldm, sd2)] == ["batch", "batch", "each"]
        assert [s.ending for s in (pixel, ldm, sd2)] == ["source", "sampled", "source"]
        with pytest.raises(InvalidSetting, match="script: got 'sd3'"):
            BlendSettings.reference("sd3")  # type: ignore[arg-type]

    def test_one_noise_for_the_batch(self) -> None:
        x = torch.zeros(3, 4, 6, 8)
        for noise_for in ("batch", "each"):
            settings = BlendSettings(noise="fresh", noise_for=noise_for)
            run = Blend(source(), torch.zeros(1, 6, 8), "eps", settings).start(SIGMAS, x)
            one, two, three = run(x, 4.0)
            assert (torch.equal(one, two) and torch.equal(two, three)) is (noise_for == "batch")
        noise = torch.randn((1, 4, 6, 8), generator=torch.Generator().manual_seed(0))
        run = Blend(source(), torch.zeros(1, 6, 8), "eps", BlendSettings(noise_for="batch")).start(SIGMAS, x)
        torch.testing.assert_close(run(x, 4.0), (source() + 4 * noise).expand_as(x))

    def test_an_end_without_a_paste(self) -> None:
        x0, aim = torch.zeros(1, 4, 6, 8), torch.full((1, 4, 6, 8), 5.0)
        blend = Blend(source(), half_mask(), "eps", BlendSettings.reference("ldm"))
        out = painted_with(x0, SIGMAS, blend, aim, settings=Sampling(20.0))
        assert torch.equal(out, aim)  # the last step's estimate, also outside the mask

    def test_starts(self) -> None:
        x0 = torch.full((1, 4, 6, 8), 3.0)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
        begun = {
            start: Sampling(10.0, seed=2, start=start).first(x0, 10.0, "eps")
            for start in ("sampler", "forward", "noise")
        }
        torch.testing.assert_close(begun["sampler"], x0 + 101**0.5 * noise)
        torch.testing.assert_close(begun["forward"], x0 + 10 * noise)
        torch.testing.assert_close(begun["noise"] / 101**0.5, noise)  # of unit variance, as their script draws it
        torch.testing.assert_close(Sampling(10.0, seed=2, start="noise").first(x0, 1.0, "flow"), noise)
        with pytest.raises(InvalidSetting, match="start: got 'here'"):
            Sampling(10.0, start="here")  # type: ignore[arg-type]

    def test_pixels_are_blended_after_the_last_share_of_the_steps(self) -> None:
        """The reference: z = q_sample(encode(decode(x0) * m + source * (1 - m)), t), at the current t."""

        class Codec:
            """Latents are images of a quarter of the size, in three of four channels."""

            def __init__(self) -> None:
                self.decoded = 0

            def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
                self.decoded += 1
                return latent[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3).movedim(1, -1).clamp(0, 1)

            def encode_image(self, image: torch.Tensor) -> torch.Tensor:
                small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 4)
                return torch.cat([small, small[:, :1]], dim=1)

        codec, image, mask = Codec(), torch.full((1, 24, 32, 3), 0.25), torch.zeros(1, 24, 32)
        mask[..., :14] = 1  # three cells and a half
        pasted = torch.full((1, 4, 6, 8), 0.25)
        pasted[..., :3], pasted[..., 3] = 0.75, (0.75 + 0.25) / 2
        x0, aim = torch.zeros(1, 4, 6, 8), torch.full((1, 4, 6, 8), 0.75)
        blend = Blend(x0, half_mask(), "eps", BlendSettings(noise="fresh", ending="sampled"))
        for level in ("next", "current"):
            pixels = PixelBlending(codec, image, mask, share=0.4, level=level)
            assert pixels.first(3) == 1 and pixels.first(50) == 30
            out = painted_with(x0, SIGMAS, blend, aim, settings=Sampling(20.0, pixels=pixels))
            if level == "next":
                torch.testing.assert_close(out, pasted)
                continue
            # Drawn: before the first step (nothing before the second), after the second, after the third.
            drawn = [torch.randn(x0.shape, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(3)]
            torch.testing.assert_close(out, (pasted + 1.0 * drawn[2]) / 2**0.5)  # sigma 1: alpha_bar is 1/2
        assert codec.decoded == 4

    def test_pixel_blending_checks_what_it_gets(self) -> None:
        image, mask = torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8)
        with pytest.raises(InvalidImage, match="8x8 is needed"):
            PixelBlending(None, image, torch.ones(1, 9, 9))  # type: ignore[arg-type]
        with pytest.raises(InvalidSetting, match=r"share: got 1\.5"):
            PixelBlending(None, image, mask, share=1.5)  # type: ignore[arg-type]


def test_first_latent_is_what_a_ksampler_starts_from() -> None:
    x0, noise = torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)
    assert torch.equal(first_latent(x0, noise, 4.0, 10.0, "eps"), x0 + 4 * noise)
    torch.testing.assert_close(first_latent(x0, noise, 10.0, 10.0, "eps"), x0 + 101**0.5 * noise)
    assert torch.equal(first_latent(x0, noise, 1.0, 1.0, "flow"), noise)
