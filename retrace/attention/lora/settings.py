"""How an identity LoRA learns."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.checks import check_steps
from ...core.errors import InvalidSetting


@dataclass(frozen=True)
class LoraTraining:
    """How the LoRA learns. The defaults are those of the authors' code.

    Args:
        rank: of every low-rank change.
        steps: of AdamW.
        learning_rate: constant.
        batch_size: random noise levels over which a step averages the gradient.
        at_once: how many of them share a pass of the network: that decides speed and memory but, up to rounding, not
            the result.
        weight_decay: of AdamW.
        recompute: see :meth:`Denoiser.differentiable`; None tries without, and with it once memory has run out.
        seed: of all randomness.

    Raises:
        InvalidSchedule: less than one step.
        InvalidSetting: another number out of its range.
    """

    rank: int = 16
    steps: int = 80
    learning_rate: float = 5e-4
    batch_size: int = 4
    at_once: int = 1
    weight_decay: float = 1e-2
    recompute: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        for name, count in (("rank", self.rank), ("batch_size", self.batch_size), ("at_once", self.at_once)):
            if count < 1:
                raise InvalidSetting(f"{name}: got {count}, but at least 1 is needed.")
        if not 0 < self.learning_rate < 1:
            raise InvalidSetting(
                f"learning_rate: got {self.learning_rate:g}, but a number above 0 and below 1 is needed (try 0.0005)."
            )
        if not 0 <= self.weight_decay < 1:
            raise InvalidSetting(f"weight_decay: got {self.weight_decay:g}, but 0 or more and less than 1 is needed.")
