"""The training of an identity LoRA: AdamW on the loss of ordinary training, at random noise levels of the image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.checks import check_latent
from ...core.errors import InvalidInput, Remedy, RetraceError, UnsupportedModel, is_out_of_memory
from ...core.host import AdapterDenoiser, Conditioning, LowRank, Parametrisation, add_noise
from .result import PROBES, IdentityLora
from .settings import LoraTraining

_SMALLEST_SCALE = 2.0**-30  # of a loss whose gradients still overflow: then the network itself is at fault

Callback = Callable[[int, int, float], None]
"""``callback(step, total, loss)`` after every step."""


def train(
    model: AdapterDenoiser,
    x0: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    training: LoraTraining | None = None,
    callback: Callback | None = None,
) -> IdentityLora:
    """Train a LoRA on the images ``x0`` ``[B, C, h, w]``, clean latents in the model's scale, under ``cond``.

    Needs a host run with ``gradients=True``. AdamW with constant rate. Several images are taken at random, one for
    each noise level. All randomness comes from ``training.seed`` and is the same on every device.

    Args:
        cond: words that describe the images; one condition for all of them.
        sigmas: ``[T]``, the noise levels of the model's training, :meth:`Host.training_sigmas`.
        callback: see :data:`Callback`; an exception it raises stops everything, as does :meth:`Denoiser.progress`.

    Raises:
        InvalidImage: not a latent.
        UnsupportedModel: a model whose attention projections the host does not know.
        InvalidInput: a condition for several images.
        RetraceError: the model answers NaN.
    """
    training = training or LoraTraining()
    x0 = check_latent("latent", x0).to(model.device, torch.float32)
    prompts = len(cond.embedding)
    if prompts != 1:
        raise InvalidInput(
            f"The condition holds {prompts} prompts, but one that describes the image is needed; several images of one "
            "thing share it.",
            Remedy.CONNECT_PROMPT,
        )
    started, before = time.perf_counter(), model.evaluations
    generator = torch.Generator().manual_seed(training.seed)
    adapters = initial_adapters(model.projections(), training.rank, generator, model.device)
    task = _Task(model, x0, cond, sigmas.detach().float().cpu(), adapters, training)
    fixed = task.probes()
    try:
        first = task.probe(fixed)
        losses = task.learn(generator, callback)
        last = task.probe(fixed)
    finally:  # a traceback may keep this frame for long
        task.forget()
    return IdentityLora(
        adapters={name: LowRank(a.down.detach().cpu(), a.up.detach().cpu()) for name, a in adapters.items()},
        losses=losses,
        before=first,
        after=last,
        evaluations=model.evaluations - before,
        backwards=task.backwards,
        recompute=task.recompute,
        seconds=round(time.perf_counter() - started, 3),
        training=training,
    )


def initial_adapters(
    projections: dict[str, tuple[int, int]], rank: int, generator: torch.Generator, device: torch.device
) -> dict[str, LowRank]:
    """Adapters that change nothing yet: ``down`` from N(0, 1 / rank^2), ``up`` 0 (as diffusers' ``LoRALinearLayer``).

    The tensors are float32 and require gradients.

    Raises:
        UnsupportedModel: there is nothing to adapt.
    """
    if not projections:
        raise UnsupportedModel("This model has no attention layers, so there is nothing that a LoRA could change.")
    with torch.inference_mode(False):
        return {
            name: LowRank(
                (torch.randn(rank, inputs, generator=generator) / rank).to(device).requires_grad_(),
                torch.zeros(outputs, rank, device=device).requires_grad_(),
            )
            for name, (outputs, inputs) in projections.items()
        }


def prediction_error(denoised: Tensor, x0: Tensor, sigma: Tensor, parametrisation: Parametrisation) -> Tensor:
    """The error of what the network predicts, from that of its clean estimate; tensors ``[B, C, h, w]``, sigma ``[B]``.

    ``D = x - sigma eps`` for eps models and ``D = x - sigma v`` for flow models (velocity: noise minus image), so the
    prediction is off by ``(x0 - D) / sigma``. For v models (Salimans & Ho 2022, appendix D) ``D = x / (1 + sigma^2)
    - v sigma / sqrt(1 + sigma^2)``, hence by ``(x0 - D) sqrt(1 + sigma^2) / sigma``.
    """
    level = sigma.reshape(-1, 1, 1, 1)
    error = (x0 - denoised) / level
    return error * (1 + level**2).sqrt() if parametrisation == "v" else error


@dataclass(frozen=True)
class _Batch:
    """Images, noise and noise levels, one of each for every row."""

    x0: Tensor
    noise: Tensor
    sigma: Tensor

    def chunks(self, size: int) -> list[_Batch]:
        parts = (tensor.split(size) for tensor in (self.x0, self.noise, self.sigma))
        return [_Batch(*part) for part in zip(*parts, strict=True)]


class _Task:
    """One training: what stays the same from step to step, and what is being learnt."""

    def __init__(
        self,
        model: AdapterDenoiser,
        x0: Tensor,
        cond: Conditioning,
        sigmas: Tensor,
        adapters: dict[str, LowRank],
        training: LoraTraining,
    ) -> None:
        self.model, self.x0, self.cond, self.sigmas = model, x0, cond, sigmas
        self.adapters, self.training = adapters, training
        self.parameters = [tensor for adapter in adapters.values() for tensor in (adapter.down, adapter.up)]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.recompute = bool(training.recompute)
        self.backwards = 0
        # Of the summed, not the mean, squared error: what goes back has the size of the error itself, so that half
        # precision neither loses nor, as a rule, overflows it.
        self.scale = 1.0

    def learn(self, generator: torch.Generator, callback: Callback | None) -> list[float]:
        """All steps; the loss of each."""
        total, losses = self.training.steps, []
        for step in range(1, total + 1):
            losses.append(self._step(self._draw(generator)))
            if callback is not None:
                callback(step, total, losses[-1])
            self.model.progress(step, total)
        return losses

    def probes(self) -> _Batch:
        """The same noises for every setting but the size: levels evenly spread, images in turn."""
        generator = torch.Generator().manual_seed(0)
        index = (torch.arange(PROBES) * 2 + 1) * len(self.sigmas) // (2 * PROBES)
        noise = torch.randn(PROBES, *self.x0.shape[1:], generator=generator)
        return self._batch(torch.arange(PROBES) % len(self.x0), noise, index)

    def probe(self, fixed: _Batch) -> float:
        """The mean squared error there, with the adapters as they are."""
        with torch.no_grad(), self.model.adapters(self.adapters):
            losses = [self._error(part).square().mean() for part in fixed.chunks(1)]
        return self._finite(float(torch.stack(losses).mean()))

    def forget(self) -> None:
        """Let go of everything that only training needs."""
        self.optimiser.zero_grad()
        self.optimiser.state.clear()

    def _draw(self, generator: torch.Generator) -> _Batch:
        count = self.training.batch_size
        index = torch.randint(len(self.sigmas), (count,), generator=generator)
        noise = torch.randn(count, *self.x0.shape[1:], generator=generator)
        one = len(self.x0) == 1
        image = torch.zeros(count).long() if one else torch.randint(len(self.x0), (count,), generator=generator)
        return self._batch(image, noise, index)

    def _batch(self, image: Tensor, noise: Tensor, index: Tensor) -> _Batch:
        return _Batch(self.x0[image.to(self.x0.device)], noise.to(self.x0), self.sigmas[index].to(self.x0))

    def _step(self, batch: _Batch) -> float:
        """One change of the adapters; the loss before it."""
        gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        losses = []
        for part in batch.chunks(self.training.at_once):
            found, loss = self._gradients(part)
            torch._foreach_add_(gradients, found, alpha=1 / batch.x0.numel())
            losses.append(loss)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        return math.fsum(losses) / batch.x0.numel()

    def _gradients(self, part: _Batch) -> tuple[list[Tensor], float]:
        """Gradients of the summed squared error, and that sum.

        Where half precision overflows on the way back, once more with a smaller loss; the scale then stays.
        """
        while True:
            try:
                found, total = self._back(part)
            except Exception as error:
                if self.recompute or self.training.recompute is not None or not is_out_of_memory(error):
                    raise
                found = None
            if found is None:  # out here, where the failed pass no longer holds its tensors
                self.recompute = True
                continue
            value = self._finite(float(total))
            if bool(torch.stack([gradient.sum() for gradient in found]).isfinite().all()):
                return found, value
            self.scale /= 16
            if self.scale < _SMALLEST_SCALE:
                self._finite(math.nan)

    def _back(self, part: _Batch) -> tuple[list[Tensor], Tensor]:
        with self.model.differentiable(recompute=self.recompute), self.model.adapters(self.adapters):
            total = self._error(part).square().sum()
            found = torch.autograd.grad(total * self.scale, self.parameters, materialize_grads=True)
        self.backwards += len(part.x0)
        return [gradient / self.scale for gradient in found], total.detach()

    def _error(self, part: _Batch) -> Tensor:
        kind = self.model.parametrisation
        x = add_noise(part.x0, part.noise, part.sigma.reshape(-1, 1, 1, 1), kind)
        return prediction_error(self.model.denoised(x, part.sigma, self.cond), part.x0, part.sigma, kind)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise RetraceError(
                "The model, or a gradient through it, is NaN or infinite, so training was stopped. Lower "
                "learning_rate; if that does not help, run the model in bf16 or in 32-bit (fp16 overflows in some "
                "models), and check that image, words and model belong together."
            )
        return loss
