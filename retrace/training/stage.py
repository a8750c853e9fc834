"""One training stage: a loop with a time budget that can be stopped and resumed at any step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.files import replacing
from .muon import Muon

log = logging.getLogger("retrace.training.pebble")


@dataclass
class Stage:
    """Train ``model`` with a cosine that ends with the budget, and an exponential moving average of the weights.

    AdamW trains what ``muon`` leaves: it names the hidden weights, by default none, that :class:`Muon` trains.
    ``seconds`` is the wall-clock budget over all resumed runs; ``max_steps`` ends a stage early on a fast device.
    The state is written to ``folder/<name>.pt`` every ``save_every`` seconds, atomically.
    """

    name: str
    model: Any
    folder: Path
    seconds: float
    max_steps: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.999
    muon: Callable[[str, Tensor], bool] = lambda name, weight: False
    muon_lr: float = 2e-3
    seed: int = 0  # of the data; a stage that goes over the same scenes again takes another one
    save_every: float = 120.0
    device: torch.device = field(default_factory=lambda: best_device())

    def __post_init__(self) -> None:
        self.model.to(self.device)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trainable = list(named.values())
        hidden = [p for name, p in named.items() if self.muon(name, p)]
        rest = [p for name, p in named.items() if not self.muon(name, p)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True)
        ]
        if hidden:
            self.optimizers.append(Muon(hidden, lr=self.muon_lr, weight_decay=self.weight_decay))
        for group in self._groups():
            group["peak"] = group["lr"]
        self.ema = [p.detach().clone() for p in self.trainable]
        self.step, self.elapsed = 0, 0.0
        self.losses: list[list[float]] = []
        self.path = self.folder / f"{self.name}.pt"
        if self.path.exists():
            self._load()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        self.step, self.elapsed, self.losses = state["step"], state["elapsed"], state["losses"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema,
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": self.losses,
        }
        with replacing(self.path) as part:
            torch.save(state, part)

    @property
    def progress(self) -> float:
        """Share of the stage that is done, 0..1, by steps or by time, whichever is further."""
        return min(1.0, max(self.step / self.max_steps, self.elapsed / self.seconds))

    def run(self, loss: Callable[[torch.Generator], Tensor]) -> None:
        """Minimise ``loss(generator)`` until the budget is spent, then leave the averaged weights in the model."""
        saved, recent = time.monotonic(), []
        while self.progress < 1.0:
            start = time.monotonic()
            # The generator follows from the step, so that a resumed run sees the same data.
            generator = torch.Generator().manual_seed(7_919 * (self.seed + self.step + 1))
            scale = min(1.0, (self.step + 1) / self.warmup) * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress))
            )
            for group in self._groups():
                group["lr"] = group["peak"] * scale
            with fast_precision(self.device):
                value = loss(generator)
            value.backward()
            nn.utils.clip_grad_norm_(self.trainable, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.trainable, 1 - decay)
            self.elapsed += time.monotonic() - start
            recent.append(float(value.detach()))
            if self.step % 50 == 0:
                self.losses.append([self.step, round(sum(recent) / len(recent), 6)])
                log.info("%s step %d, %.0f s, loss %.5f", self.name, self.step, self.elapsed, self.losses[-1][1])
                recent.clear()
            if time.monotonic() - saved > self.save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        self.load_average()

    def load_average(self) -> None:
        with torch.no_grad():
            for p, e in zip(self.trainable, self.ema, strict=True):
                p.copy_(e)
        self.model.eval()

    def summary(self) -> dict[str, object]:
        """What the card says about this stage."""
        return {
            "steps": self.step,
            "seconds": round(self.elapsed),
            "device": str(self.device),
            "losses": self.losses[:: max(1, len(self.losses) // 12)],
        }


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_bf16_is_fast: dict[str, bool] = {}


def _probe_bf16(device: torch.device) -> bool:
    """Whether a bf16 matmul beats fp32 here: true on GPUs and on CPUs with AMX, false (by far) on other CPUs."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype, device=device)
        a @ a
        start = time.perf_counter()
        for _ in range(3):
            a = a @ a * 1e-3
        float(a[0, 0])
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < seconds(torch.float32)


@contextlib.contextmanager
def fast_precision(device: torch.device) -> Iterator[None]:
    """bf16 autocast where this machine is faster with it, fp32 elsewhere."""
    if device.type not in _bf16_is_fast:
        _bf16_is_fast[device.type] = _probe_bf16(device)
    with contextlib.ExitStack() as stack:
        if _bf16_is_fast[device.type]:
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if (
                device.type == "cpu"
            ):  # its fused attention has a slow bf16 backward; two matmuls take a third of the time
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
