"""Training a LoRA on one picture: the formulas, and the loop around a network of one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.attention.lora.result import PROBES
from retrace.attention.lora.settings import LoraTraining
from retrace.attention.lora.train import initial_adapters, prediction_error, train
from retrace.core.errors import InvalidImage, InvalidInput, InvalidSetting, RetraceError, UnsupportedModel
from retrace.core.host import LowRank, Parametrisation, add_noise
from retrace.hosts.common.adapters import adapted, shape_of
from retrace.pictures.loss_plot import loss_picture, running_mean
from tests.rounding import assert_trained_alike

pytestmark = pytest.mark.rounding

SIGMAS = torch.logspace(-1.5, 1.1, 50)
NAME = "mid.0.0.attn1.q"


class Words:
    def __init__(self, prompts: int = 1) -> None:
        self.embedding = torch.zeros(prompts, 1, 1)

    def with_embedding(self, embedding: Tensor) -> Words:
        raise NotImplementedError


class OneLayer:
    """A denoiser whose network is one linear map over the channels; what it predicts is eps, v or velocity."""

    def __init__(self, parametrisation: Parametrisation = "eps", channels: int = 4) -> None:
        self.parametrisation = parametrisation
        self.device = torch.device("cpu")
        self.evaluations = 0
        self.layer = nn.Linear(channels, channels).requires_grad_(False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(channels, channels, generator=torch.Generator().manual_seed(1)))
            self.layer.bias.zero_()
        self.recompute: list[bool] = []
        self.reports: list[tuple[int, int]] = []
        self.largest = math.inf  # gradients beyond it become infinite, as in half precision
        self.memory = math.inf  # rows that fit, without recomputation
        self.output: Tensor

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
        self.evaluations += len(x)
        if torch.is_grad_enabled() and len(x) > self.memory and not self.recompute[-1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        s = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        given = x if self.parametrisation == "flow" else x / (1 + s**2).sqrt()
        self.output = self.layer(given.movedim(1, -1)).movedim(-1, 1)
        if self.output.requires_grad:
            self.output.register_hook(lambda g: torch.where(g.abs() > self.largest, math.inf, g))
        if self.parametrisation == "v":
            return x / (1 + s**2) - self.output * s / (1 + s**2).sqrt()
        return x - s * self.output

    @contextmanager
    def differentiable(self, *, recompute: bool = False) -> Iterator[None]:
        self.recompute.append(recompute)
        with torch.enable_grad():
            yield

    def projections(self) -> dict[str, tuple[int, int]]:
        return {NAME: shape_of(self.layer)}

    def adapters(self, adapters: Mapping[str, LowRank]) -> AbstractContextManager[None]:
        return adapted({NAME: self.layer}, adapters, self.device)

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        self.reports.append((step, total))

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


def picture(count: int = 1) -> Tensor:
    return torch.randn(count, 4, 3, 5, generator=torch.Generator().manual_seed(2))


ROUNDINGS = 5 * 3 * 4  # of as many steps, forward and back twice; noise, layer, adapter and error


def learnt(model: Any, x0: Tensor | None = None, **settings: Any) -> Any:
    defaults = {"rank": 2, "steps": 5}
    return train(model, picture() if x0 is None else x0, Words(), SIGMAS, LoraTraining(**{**defaults, **settings}))


def ordinary_target(kind: Parametrisation, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What ordinary training compares the network's output with."""
    if kind == "flow":
        return noise - x0
    if kind == "eps":
        return noise
    alpha, spread = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    return alpha * noise - spread * x0  # Salimans & Ho 2022, section 4


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_loss_and_gradient_are_those_of_ordinary_training(kind: Parametrisation) -> None:
    """In fp32, from the lowest to the highest level of Stable Diffusion."""
    model = OneLayer(kind)
    generator = torch.Generator().manual_seed(0)
    x0, noise = picture(6), torch.randn(6, 4, 3, 5, generator=generator)
    sigma = torch.linspace(0.03, 0.97, 6) if kind == "flow" else torch.logspace(math.log10(0.0292), math.log10(14.6), 6)
    adapters = {NAME: LowRank(*(torch.randn(2, 4, generator=generator) for _ in range(2)))}
    adapters = {NAME: LowRank(adapters[NAME].down.requires_grad_(), adapters[NAME].up.T.clone().requires_grad_())}
    level = sigma.reshape(-1, 1, 1, 1)
    with model.differentiable(), model.adapters(adapters):
        denoised = model.denoised(add_noise(x0, noise, level, kind), sigma, None)
        error = prediction_error(denoised, x0, sigma, kind)
        expected = model.output - ordinary_target(kind, x0, noise, level)
        tensors = (adapters[NAME].down, adapters[NAME].up)
        ours = torch.autograd.grad(error.square().mean(), tensors, retain_graph=True)
        theirs = torch.autograd.grad(expected.square().mean(), tensors)
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_first_values_are_those_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    (adapter,) = initial_adapters({"a": (320, 768)}, 16, generator, torch.device("cpu")).values()
    assert adapter.down.shape == (16, 768) and adapter.up.shape == (320, 16)
    assert float(adapter.down.detach().std()) == pytest.approx(1 / 16, rel=0.02)
    assert not adapter.up.any()
    assert all(t.requires_grad and t.is_leaf and t.dtype == torch.float32 for t in (adapter.down, adapter.up))


def test_an_adapter_is_the_merged_weight() -> None:
    layer = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(2, 3, 6)
    first, second = (LowRank(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(2))
    plain, cpu = layer(x), torch.device("cpu")
    with adapted({"a": layer}, {"a": first}, cpu), adapted({"a": layer}, {"a": second}, cpu):
        both = layer(x)
    merged = layer.weight + first.up @ first.down + second.up @ second.down
    torch.testing.assert_close(both, F.linear(x, merged, layer.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), plain)
    with adapted({"a": layer}, {"a": replace(first, up=torch.zeros(5, 2))}, cpu):
        assert torch.equal(layer(x), plain)


def test_half_precision_computes_in_its_own_type() -> None:
    layer = nn.Linear(6, 5).to(torch.bfloat16).requires_grad_(False)
    adapter = LowRank(torch.randn(2, 6).requires_grad_(), torch.randn(5, 2).requires_grad_())
    with adapted({"a": layer}, {"a": adapter}, torch.device("cpu")):
        output = layer(torch.randn(1, 6).to(torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert adapter.down.grad is not None and adapter.down.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "adapter", [LowRank(torch.zeros(2, 7), torch.zeros(5, 2)), LowRank(torch.zeros(3, 6), torch.zeros(5, 2))]
)
def test_adapters_of_another_model_are_refused(adapter: LowRank) -> None:
    layer = nn.Linear(6, 5)
    with (
        pytest.raises(UnsupportedModel, match="Train it again"),
        adapted({"a": layer}, {"a": adapter}, torch.device("cpu")),
    ):
        pass
    with (
        pytest.raises(UnsupportedModel, match="'b', which this model does not have"),
        adapted({"a": layer}, {"b": adapter}, torch.device("cpu")),
    ):
        pass
    assert not layer._forward_hooks


def test_it_learns_and_says_what_it_cost() -> None:
    model = OneLayer()
    found = learnt(model, steps=40, learning_rate=0.05, batch_size=3)
    assert found.after < 0.7 * found.before
    assert len(found.losses) == 40
    assert (found.evaluations, found.backwards) == (
        40 * 3 + 2 * PROBES,
        40 * 3,
    ) and model.evaluations == 40 * 3 + 2 * PROBES
    assert model.reports == [(i, 40) for i in range(1, 41)]
    assert list(found.adapters) == [NAME] and not found.adapters[NAME].up.requires_grad
    assert model.layer.weight.grad is None
    assert found.text(7).splitlines() == [
        "rank 2, 40 steps of 3 noise levels, learning rate 0.05, seed 0",
        f"loss at 8 fixed noise levels: {found.before:.4f} before, {found.after:.4f} after",
        f"{found.evaluations} network evaluations, 120 backward passes, {found.seconds:.1f} s",
        "peak memory 7 MB",
    ]


def test_one_step_is_adamw_on_the_mean_of_the_batch() -> None:
    """Written out: the generator gives the first values, then noise levels, then noise."""
    model, x0, rank = OneLayer(), picture(), 2
    found = learnt(model, x0, steps=1, batch_size=3, seed=7, weight_decay=0.1)
    generator = torch.Generator().manual_seed(7)
    down = (torch.randn(rank, 4, generator=generator) / rank).requires_grad_()
    up = torch.zeros(4, rank, requires_grad=True)
    sigma = SIGMAS[torch.randint(50, (3,), generator=generator)].reshape(-1, 1, 1, 1)
    noise = torch.randn(3, 4, 3, 5, generator=generator)
    given = ((x0 + sigma * noise) / (1 + sigma**2).sqrt()).movedim(1, -1)
    predicted = F.linear(given, model.layer.weight + up @ down).movedim(-1, 1)
    loss = F.mse_loss(predicted, noise)
    loss.backward()
    torch.optim.AdamW([down, up], lr=5e-4, betas=(0.9, 0.999), weight_decay=0.1).step()
    assert found.losses == [pytest.approx(float(loss.detach()), rel=1e-5)]
    torch.testing.assert_close(found.adapters[NAME].down, down.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.adapters[NAME].up, up.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("at_once", [2, 3, 5, 9])
def test_rows_that_share_a_pass_change_nothing(at_once: int) -> None:
    one, many = (learnt(OneLayer(), picture(3), batch_size=5, at_once=n, learning_rate=1e-2) for n in (1, at_once))
    assert one.losses == pytest.approx(many.losses, rel=1e-4)
    assert_trained_alike(one.adapters[NAME].up, many.adapters[NAME].up, ROUNDINGS)
    assert one.evaluations == many.evaluations


def test_seeds() -> None:
    models = [OneLayer() for _ in range(3)]
    state = torch.random.get_rng_state()
    first, again, other = (learnt(model, seed=seed) for model, seed in zip(models, (1, 1, 2), strict=True))
    assert torch.equal(first.adapters[NAME].down, again.adapters[NAME].down) and first.losses == again.losses
    assert first.losses != other.losses
    assert first.before == other.before  # fixed noises
    assert torch.equal(torch.random.get_rng_state(), state)


def test_overflow_on_the_way_back_costs_a_pass_and_no_step() -> None:
    """The gradient of the summed loss is the error itself; here even that is too large."""
    clear, model = learnt(OneLayer(), batch_size=2), OneLayer()
    model.largest = 0.5
    tight = learnt(model, batch_size=2)
    assert tight.backwards > clear.backwards
    assert tight.losses == pytest.approx(clear.losses, rel=1e-5)
    torch.testing.assert_close(tight.adapters[NAME].up, clear.adapters[NAME].up, rtol=1e-4, atol=1e-6)


def test_endless_overflow_is_an_error() -> None:
    model = OneLayer()
    model.largest = 0.0
    with pytest.raises(RetraceError, match="NaN or infinite"):
        learnt(model)


def test_nan_is_an_error() -> None:
    model = OneLayer()
    model.layer.weight.fill_(math.nan)
    with pytest.raises(RetraceError, match=r"bf16 or in 32-bit.*belong together"):
        learnt(model)


def test_memory_that_runs_out_is_saved_where_that_is_allowed() -> None:
    for allowed in (None, True, False):
        model = OneLayer()
        model.memory = 1
        if allowed is False:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                learnt(model, at_once=2, recompute=allowed)
            continue
        found = learnt(model, at_once=2, recompute=allowed)
        assert found.recompute
        assert model.recompute.count(False) == (1 if allowed is None else 0)
        assert found.losses == learnt(OneLayer(), at_once=2).losses
    assert not learnt(OneLayer()).recompute


def test_an_exception_of_the_callback_stops_it() -> None:
    class Stop(BaseException):
        pass

    def stop(step: int, total: int, loss: float) -> None:
        if step == 2:
            raise Stop

    model = OneLayer()
    with pytest.raises(Stop):
        train(model, picture(), Words(), SIGMAS, LoraTraining(rank=2), stop)
    assert model.reports == [(1, 80)] and not model.layer._forward_hooks


def test_several_pictures_all_count() -> None:
    seen: set[float] = set()

    class Watching(OneLayer):
        def denoised(self, x: Tensor, sigma: Tensor | float, cond: Any) -> Tensor:
            if torch.is_grad_enabled():
                seen.add(round(float(x.mean()), -2))
            return super().denoised(x, sigma, cond)

    learnt(Watching(), torch.stack([torch.full((4, 3, 5), value) for value in (0.0, 100.0)]), steps=4)
    assert seen == {0.0, 100.0}


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"rank": 0}, "rank"), ({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size"), ({"at_once": 0}, "at_once"),
     ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": math.nan}, "learning_rate"),
     ({"weight_decay": -1.0}, "weight_decay")],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidSetting, match=word):
        LoraTraining(**settings)


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(InvalidImage, match="latent"):
        learnt(OneLayer(), torch.zeros(4, 3, 5))
    with pytest.raises(InvalidInput, match="holds 2 prompts"):
        train(OneLayer(), picture(2), Words(2), SIGMAS)
    with pytest.raises(UnsupportedModel, match="no attention layers"):
        initial_adapters({}, 4, torch.Generator(), torch.device("cpu"))


class TestPicture:
    def test_running_mean(self) -> None:
        assert running_mean([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]

    @pytest.mark.parametrize("losses", [[0.1], [0.2, 0.2], [0.0, 1.0], [0.0], [1e-6, 10.0]])
    def test_any_losses_can_be_drawn(self, losses: list[float]) -> None:
        shown = loss_picture(losses)
        assert shown.shape == (1, 320, 640, 3) and 0 <= float(shown.min()) < 0.5 < float(shown.max()) <= 1

    def test_a_falling_loss_falls(self) -> None:
        """The line's blue pixels are lower at the right than at the left."""
        shown = loss_picture([10 ** (-i / 40) for i in range(80)])[0]
        line = ((shown - torch.tensor([31, 95, 168]) / 255).abs().sum(-1) < 0.02).float()
        rows = torch.arange(len(shown)).float()[:, None]
        left, right = ((part * rows).sum() / part.sum() for part in (line[:, 64:200], line[:, 500:]))
        assert right > left + 80
