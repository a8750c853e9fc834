"""The standalone edit on a model with a formula: what changes, what stays, what it costs, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.blending.paste import paste_background
from retrace.cli.edit import STAGES, EditPrompts, EditSettings, edit_image
from retrace.core.errors import InvalidImage, InvalidInput, InvalidSchedule, InvalidSetting, RetraceError
from retrace.core.host import Parametrisation
from retrace.core.prompt import Prompt
from retrace.pictures.contact_sheet import contact_sheet, edit_panels

SOURCE, TARGET = "0.2", "0.8"  # prompts of the model below are the grey that it draws


@dataclass
class Grey:
    """Every picture is one grey, N(prompt, 0.05^2) per latent cell; the VAE averages 8 x 8 pixels."""

    name: str = "grey"
    parametrisation: Parametrisation = "eps"
    latent_channels: int = 3
    downscale: int = 8
    latent_format: str = "grey"
    evaluations: int = 0
    reports: list[tuple[int, int]] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    broken: bool = False

    def sigmas(self, scheduler: str, steps: int) -> Tensor:
        return torch.cat([torch.linspace(math.log(10), math.log(0.05), steps).exp(), torch.zeros(1)])

    def training_sigmas(self) -> Tensor:
        return self.sigmas("", 100).flip(0)[1:]

    def fingerprint(self) -> str:
        return "grey"

    def encode_text(self, prompt: str | Sequence[str]) -> float:
        assert isinstance(prompt, str)
        return float(prompt or 0.5)

    def read_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        raise NotImplementedError

    def encode_image(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image.movedim(-1, 1), 8)

    def decode_latent(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=8).movedim(1, -1).clamp(0, 1)

    def decode_differentiable(self, latent: Tensor) -> Tensor:
        raise NotImplementedError

    def private_decoder(self, latent: Tensor) -> AbstractContextManager[nn.Module]:
        raise NotImplementedError

    def run(
        self, latent: Tensor, conds: Mapping[str, Any], method: Callable[..., Any], *, gradients: bool = False
    ) -> Any:
        return method(self, latent, conds)

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: float) -> Tensor:
        self.evaluations += len(x)
        if self.broken:
            return torch.full_like(x, math.nan)
        variance = 0.05**2
        return cond + variance / (variance + float(sigma) ** 2) * (x - cond)

    def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: list[float]) -> list[Tensor]:
        return [self.denoised(x, sigma, cond) for cond in conds]

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        self.reports.append((step, total))


@pytest.fixture
def image() -> Tensor:
    cells = 0.2 + 0.05 * torch.randn(1, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    return cells.repeat_interleave(8, 1).repeat_interleave(8, 2).clamp(0, 1)


@pytest.fixture
def mask() -> Tensor:
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:24, 16:32] = 1
    return mask


def edit(image: Tensor, mask: Tensor, host: Any = None, **settings: Any) -> Any:
    chosen = EditSettings(**{"steps": 12, "guidance": 1.0, "feather": 0.0, **settings})
    return edit_image(host or Grey(), image, mask, EditPrompts(SOURCE, TARGET), chosen)


def test_the_edit_shows_the_prompt_inside_and_the_source_outside(image: Tensor, mask: Tensor) -> None:
    result = edit(image, mask)
    inside = mask > 0
    assert result.edited.shape == image.shape
    assert abs(float(result.edited[inside].mean()) - 0.8) < 0.05
    assert torch.equal(result.edited[~inside], image[~inside])


@pytest.mark.parametrize("background", ["trajectory", "fixed", "fresh"])
def test_every_background_keeps_the_latent_outside(image: Tensor, mask: Tensor, background: Any) -> None:
    result = edit(image, mask, background=background)
    assert result.scores()["edit"].mean.max_difference_outside == 0
    assert abs(float(result.edited[mask > 0].mean()) - 0.8) < 0.05


def test_the_reconstruction_is_the_source(image: Tensor, mask: Tensor) -> None:
    result = edit(image, mask, method="fixed_point")
    assert float((result.reconstruction - result.decoded).abs().max()) < 1e-3
    assert result.scores()["reconstruction"].mean.overall.psnr > 50


def test_the_edit_before_pasting_is_there_too(image: Tensor, mask: Tensor) -> None:
    result = edit(image, mask, feather=4.0)
    assert not torch.equal(result.painted, result.edited)
    assert torch.equal(paste_background(result.painted, image, mask, 4.0), result.edited)


def test_gradients_are_asked_for_where_the_inversion_needs_them(image: Tensor, mask: Tensor) -> None:
    asked: dict[str, list[bool]] = {}

    @dataclass
    class Watched(Grey):
        method: str = ""

        def run(self, *args: Any, gradients: bool = False, **more: Any) -> Any:
            asked.setdefault(self.method, []).append(gradients)
            return super().run(*args, **more)

        @contextmanager
        def differentiable(self) -> Iterator[None]:
            with torch.enable_grad():
                yield

    for method in ("ddim", "fixed_point", "spdinv"):
        edit(image, mask, Watched(method=method), method=method, steps=3)
    assert asked == {"ddim": [False] * 3, "fixed_point": [False] * 3, "spdinv": [True, False, False]}


@pytest.mark.parametrize(("top", "scale"), [(10.0, math.sqrt(1 + 100)), (20.0, 10.0)])
def test_at_the_highest_level_the_noise_has_the_variance_of_the_training(
    image: Tensor, mask: Tensor, top: float, scale: float
) -> None:
    """As ComfyUI's KSampler starts; one level below it is the forward process."""
    seen: list[Tensor] = []

    @dataclass
    class Watched(Grey):
        def training_sigmas(self) -> Tensor:
            return torch.tensor([0.05, top])

        def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: list[float]) -> list[Tensor]:
            seen.append(x.clone())
            return super().denoised_each(x, sigma, conds)

    edit(image, torch.ones_like(mask), Watched(), guidance=2.0, seed=3)
    latent = Grey().encode_image(image)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(seen[0], latent + scale * noise)


def test_a_batch_has_a_prompt_for_each_image_or_one(image: Tensor, mask: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"^prompt: got 3 texts for 1 images"):
        edit_image(Grey(), image, mask, EditPrompts(SOURCE, [TARGET] * 3))


def test_little_strength_stays_close_to_the_source(image: Tensor, mask: Tensor) -> None:
    """The last quarter of the steps starts from little noise, and inversion goes up only as far."""
    full, little = (edit(image, mask, strength=s, sampler="euler", background="trajectory") for s in (1.0, 0.25))
    assert little.trajectory.steps == 3
    assert torch.equal(little.trajectory.sigmas, full.trajectory.sigmas[-4:])
    inside = mask > 0
    assert float(little.edited[inside].mean()) < float(full.edited[inside].mean()) - 0.1


def test_the_same_seed_gives_the_same_picture(image: Tensor, mask: Tensor) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (edit(image, mask, background="fixed", seed=s).edited for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"


def test_cost_is_counted_and_reported(image: Tensor, mask: Tensor) -> None:
    stages: list[str] = []
    host = Grey()
    settings = EditSettings(steps=10, guidance=3.0, method="ddim")
    result = edit_image(host, image, mask, EditPrompts(SOURCE, TARGET), settings, on_stage=stages.append)
    assert tuple(stages) == STAGES
    assert result.evaluations == {"invert": 10, "reconstruct": 10, "edit": 20}
    assert host.reports.count((10, 10)) == 3
    report = json.loads(json.dumps(result.report(), allow_nan=False))
    assert report["settings"]["guidance"] == 3.0
    assert set(result.scores()) == {"vae", "reconstruction", "edit"}


def test_a_batch_is_edited_image_by_image(image: Tensor, mask: Tensor) -> None:
    both = edit(torch.cat([image, image.flip(2)]), mask)
    assert both.edited.shape[0] == 2
    assert torch.equal(both.edited[:, 0], torch.cat([image, image.flip(2)])[:, 0])


def test_feathering_stays_inside_the_mask(image: Tensor, mask: Tensor) -> None:
    hard, soft = edit(image, mask).edited, edit(image, mask, feather=4.0).edited
    assert torch.equal(soft[mask == 0], image[mask == 0])
    assert float((soft - image).abs()[:, 8, 24].max()) < float((hard - image).abs()[:, 8, 24].max())


@pytest.mark.parametrize(("strength", "walked"), [(1.0, 8), (0.5, 3), (0.999, 6), (0.01, 1)])
def test_strength_counts_from_the_end(strength: float, walked: int) -> None:
    """A scheduler may have more steps than asked for, as ddim_uniform; ComfyUI drops the first ones then."""
    sigmas = torch.arange(9.0).flip(0)
    kept = EditSettings(steps=6, strength=strength).walked(sigmas)
    assert torch.equal(kept, sigmas[-walked - 1 :])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, InvalidSchedule, "steps: got 0"),
        ({"strength": 0.0}, InvalidSetting, r"strength: got 0\.0"),
        ({"strength": 1.5}, InvalidSetting, r"strength: got 1\.5"),
        ({"guidance": float("nan")}, InvalidSetting, "guidance: got nan"),
        ({"guidance": -1.0}, InvalidSetting, r"guidance: got -1\.0"),
        ({"feather": -1.0}, InvalidSetting, r"feather: got -1\.0"),
        ({"shrink": -1}, InvalidSetting, "shrink: got -1"),
        ({"method": "best"}, InvalidSetting, "method: got 'best', but one of ddim"),
        ({"sampler": "heun"}, InvalidSetting, "sampler: got 'heun'"),
        ({"background": "none"}, InvalidSetting, "background: got 'none'"),
        ({"cells": "some"}, InvalidSetting, "cells: got 'some'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EditSettings(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, m: (i[..., :1], m), "one channel"),
        (lambda i, m: (torch.cat([i, i[..., :1]], -1), m), "RGBA"),
        (lambda i, m: (i, m[0]), "two dimensions|batch dimension is missing"),
        (lambda i, m: (i, m[:, :16]), "32"),
        (lambda i, m: (i, m * 0), "0 everywhere"),
        (lambda i, m: (i * math.nan, m), "NaN|nan"),
    ],
)
def test_bad_pictures_are_refused(image: Tensor, mask: Tensor, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        edit(*change(image, mask))


def test_a_model_that_breaks_is_reported(image: Tensor, mask: Tensor) -> None:
    with pytest.raises(RetraceError, match="NaN"):
        edit(image, mask, Grey(broken=True))


def test_the_contact_sheet_holds_five_pictures(image: Tensor, mask: Tensor) -> None:
    result = edit(image, mask)
    pictures = (result.source[0], result.mask[0], result.reconstruction[0], result.edited[0])
    panels = edit_panels(*pictures, result.scores(), SOURCE, TARGET)
    assert [p.title for p in panels] == ["Source", "Mask", "Reconstruction", "Edit", "Difference x5"]
    assert any("identical" in line for line in panels[-1].lines)
    assert all(any(word in " ".join(panels[3].lines) for word in pair) for pair in (("inside",), ("PSNR",), ("SSIM",)))
    sheet = contact_sheet(panels, "heading")
    assert sheet.width >= 5 * 256 and sheet.height >= 32 * 5
    # The first picture, enlarged, lies under its title.
    red = round(float(result.source[0, 0, 0, 0]) * 255)
    column = [sheet.getpixel((20, y)) for y in range(40, 120)]
    assert any(isinstance(pixel, tuple) and pixel[0] == red for pixel in column)
