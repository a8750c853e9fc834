"""Background reconstruction with decoders small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from retrace.blending.decoder import Training, reconstruct_background, reconstruction_loss, train_decoder
from retrace.core.errors import InvalidImage, InvalidSetting, RetraceError, UnsupportedModel
from retrace.hosts.common.private_decoder import private_decoder

pytestmark = pytest.mark.rounding


class Tiny(nn.Module):
    """An autoencoder whose latents are pictures of a quarter of the size, and whose decoder can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.AvgPool2d(4)
        self.decoder = nn.Sequential(
            nn.Upsample(scale_factor=4), nn.Conv2d(3, 16, 5, padding=2), nn.SiLU(), nn.Conv2d(16, 3, 5, padding=2)
        )
        self.fixed = nn.Conv2d(3, 3, 1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.fixed(latent))  # type: ignore[no-any-return]


class Autoencoder:
    def __init__(self) -> None:
        with torch.inference_mode(), torch.random.fork_rng():  # as ComfyUI makes its models
            torch.manual_seed(0)
            self.network = Tiny().half()
        self.copies: list[nn.Module] = []

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.encoder(image.movedim(-1, 1) * 2 - 1)  # type: ignore[no-any-return]

    @contextmanager
    def private_decoder(self, latent: torch.Tensor) -> Iterator[nn.Module]:
        assert latent.shape[0] == 1
        with private_decoder(self.network, torch.device("cpu"), lambda copy, z: copy.decode(z)) as decoder:
            self.copies.append(decoder)
            yield decoder


def pictures(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(batch, 8, 6, 3, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    mask = torch.zeros(batch, 32, 24)
    mask[:, 8:20, 8:20] = 1
    edited = torch.where(mask[..., None] > 0, 1 - source, source)
    return edited, source, mask


FAST = Training(steps=40, learning_rate=1e-2, patience=0)


def test_the_loss_by_hand() -> None:
    decoded, edited, source = (torch.full((1, 3, 2, 2), value) for value in (0.0, 0.5, 0.25))
    mask = torch.tensor([[1.0, 0.0], [0.5, 0.0]])[None, None]
    # Means over all four pixels: inside (0.5^2 + 0.25^2) / 4, outside (2 * 0.25^2 + 0.125^2) / 4.
    inside, outside = (0.25 + 0.0625) / 4, (2 * 0.0625 + 0.015625) / 4
    loss = reconstruction_loss(decoded, edited, source, mask, 100)
    assert loss.item() == pytest.approx(inside + 100 * outside)
    assert reconstruction_loss(decoded, edited, source, mask, 0).item() == pytest.approx(inside)


class Shift(nn.Module):
    """Adds one number to all values; ``slope`` is what the loss falls by."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(start))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent + self.shift) * self.frozen


def test_first_adam_steps_by_hand() -> None:
    """The first step of Adam has the length of the learning rate, against the sign of the gradient."""
    zeros, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    for goal in (1.0, -1.0):
        decoder = Shift()
        trained = train_decoder(decoder, zeros, zeros + goal, zeros + goal, mask, Training(1, 0.01))
        assert decoder.shift.item() == pytest.approx(0.01 * goal, rel=1e-4)
        assert trained.steps == 1 and trained.decoded.mean().item() == pytest.approx(0.01 * goal, rel=1e-4)
        assert not trained.decoded.requires_grad and decoder.shift.grad is None
    # Gradients of (1 + 100) / 2 (s - 1)^2: the second step by Adam's formula.
    decoder, rate = Shift(), 0.1
    train_decoder(decoder, zeros, zeros + 1, zeros + 1, mask, Training(2, rate))
    first, second = (101 * (s - 1) for s in (0.0, rate))
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    assert decoder.shift.item() == pytest.approx(rate - rate * mean / square**0.5, rel=1e-4)


def test_steps_are_counted_and_end_early() -> None:
    zeros, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1

    def run(**changes: float) -> tuple[int, float, float]:
        seen = []
        given = {"steps": 30, "learning_rate": 0.05, "patience": 0, **changes}
        training = Training(**given)  # type: ignore[arg-type]
        trained = train_decoder(
            Shift(), zeros, zeros + 0.5, zeros + 0.5, mask, training, lambda step, _: seen.append(step)
        )
        assert seen == list(range(trained.steps + 1))
        return trained.steps, trained.before, trained.after

    steps, before, after = run()
    assert steps == 30 and before == pytest.approx(-20 * torch.tensor(0.25).log10().item(), rel=1e-5)
    assert run(steps=0) == (0, before, before)
    stopped, _, reached = run(stop=20.0)
    assert 0 < stopped < 30 and before < 20 <= reached < after
    # With so long a step it swings around the goal: the best picture counts, and waiting for a better one ends.
    early, _, best = run(learning_rate=0.45, steps=1000, patience=5)
    assert early < 1000 and best > before


def test_what_cannot_be_trained_says_so() -> None:
    zeros, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(RetraceError, match=r"NaN or infinite values after 0 steps. Lower learning_rate"):
        train_decoder(Shift(float("nan")), zeros, zeros, zeros, mask, Training(2))
    for wrong in ({"steps": -1}, {"learning_rate": 0.0}, {"weight": -1.0}, {"stop": float("nan")}, {"patience": -1}):
        with pytest.raises(InvalidSetting, match=f"{next(iter(wrong))}: got"):
            Training(**wrong)


def test_the_latent_can_learn_instead() -> None:
    """The authors' other mode: Adam at 0.1 on the latent, the decoder as it is. Its first step moves by 0.1."""
    reference = Training.reference("latent")
    assert (reference.steps, reference.learning_rate, reference.weight, reference.patience) == (75, 0.1, 100, 0)
    assert Training.reference() == Training(patience=0)
    decoder, latent = Shift(), torch.zeros(1, 3, 4, 4)
    aim, mask = torch.full((1, 3, 4, 4), 0.6), torch.zeros(1, 1, 4, 4)
    seen: list[torch.Tensor] = []
    result = train_decoder(decoder, latent, aim, aim, mask, reference, lambda _, decoded: seen.append(decoded))
    assert torch.allclose(seen[1], torch.full_like(aim, 0.1), atol=1e-4)
    assert result.steps == 75 and torch.allclose(result.decoded, aim, atol=0.05) and result.after > result.before + 20
    assert float(decoder.shift.detach()) == 0 and not latent.any() and not latent.requires_grad
    edited, source, mask = pictures(1)
    latents = Training(steps=40, learning_rate=0.05, patience=0, target="latent")
    found = reconstruct_background(Autoencoder(), edited, source, mask, latents)
    assert found.after[0] > found.before[0]


def test_the_background_comes_back_and_the_edit_stays() -> None:
    edited, source, mask = pictures()
    model = Autoencoder()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    reports: list[tuple[int, int]] = []
    with torch.inference_mode():
        result = reconstruct_background(
            model, edited, source, mask, FAST, lambda step, total, _: reports.append((step, total))
        )
    assert result.steps == (40, 40) and result.image.shape == edited.shape and result.image.dtype == edited.dtype
    assert all(after > plain + 5 for plain, after in zip(result.before, result.after, strict=True))
    inside = mask > 0
    to_edit, to_source = ((result.image - other)[inside].square().mean() for other in (edited, source))
    assert to_edit < 0.2 * to_source
    assert reports == [(i * 40 + step, 80) for i in range(2) for step in range(41)]
    assert "number 1" in result.text() and "after 40 steps" in result.text()
    # The model is what it was, and the copies, one for each picture, hold nothing any more.
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
    assert all(p.grad is None for p in model.network.parameters())
    assert len(model.copies) == 2 and all(p.numel() == 0 for copy in model.copies for p in copy.parameters())
    # Each picture starts from the original weights: alone it is the same.
    alone = reconstruct_background(model, edited[1:], source[1:], mask[1:], FAST)
    assert torch.equal(alone.image, result.image[1:])


def test_one_source_and_one_mask_serve_a_batch_and_borders_may_be_masked() -> None:
    edited, source, mask = pictures()
    mask[:, :, :10] = 1
    short = Training(steps=2)
    both = reconstruct_background(Autoencoder(), edited, source[:1], mask[:1], short)
    alone = reconstruct_background(Autoencoder(), edited[1:], source[:1], mask[:1], short)
    assert torch.equal(both.image[1:], alone.image)
    empty = reconstruct_background(Autoencoder(), edited, source, torch.zeros_like(mask), FAST)
    assert min(empty.after) > max(empty.before)
    with pytest.raises(InvalidImage, match=r"above 0 everywhere"):
        reconstruct_background(Autoencoder(), edited, source, torch.ones_like(mask), short)


def test_stopping_leaves_no_weights_behind() -> None:
    edited, source, mask = pictures()
    model = Autoencoder()

    class Stopped(BaseException):
        pass

    def stop(step: int, total: int, image: torch.Tensor) -> None:
        if step == 3:
            raise Stopped

    with torch.inference_mode(), pytest.raises(Stopped):
        reconstruct_background(model, edited, source, mask, FAST, stop)
    (copy,) = model.copies
    assert all(p.numel() == 0 and p.grad is None for p in copy.parameters())


def test_a_private_copy_is_ordinary_float32_and_trains_only_the_decoder() -> None:
    model = Autoencoder()
    with torch.inference_mode(), model.private_decoder(torch.zeros(1, 3, 2, 2)) as decoder:
        names = {name for name, p in decoder.named_parameters() if p.requires_grad}
        assert names == {f"autoencoder.decoder.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")}
        assert all(p.dtype == torch.float32 and not p.is_inference() for p in decoder.parameters())
        latent = torch.randn(1, 3, 2, 2)
        expected = model.network.float().decode(latent)
        assert torch.equal(decoder(latent), expected)
        assert isinstance(decoder.get_submodule("autoencoder.encoder"), nn.Identity)
    with (
        pytest.raises(UnsupportedModel, match=r"'Conv2d'.*no decoder.*poisson"),
        private_decoder(nn.Conv2d(3, 3, 1), torch.device("cpu"), lambda copy, z: z),
    ):
        pass
