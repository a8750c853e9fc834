"""What a training of an identity LoRA made, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core.host import LowRank
from ...core.report import memory_lines
from .settings import LoraTraining

PROBES = 8  # fixed noise levels at which the result is compared with the model as it was


@dataclass(frozen=True)
class IdentityLora:
    """Adapters for :meth:`Denoiser.adapters`, on the CPU, and how they were found.

    ``losses`` is the mean squared error of every step's random noise levels. ``before`` and ``after`` are that at
    :data:`PROBES` fixed noises, evenly spread over the levels, and can be compared. ``evaluations`` and ``backwards``
    count passes of the network per image and noise level, including those for ``before`` and ``after``. ``recompute``
    says whether blocks were computed twice in the end.
    """

    adapters: dict[str, LowRank] = field(repr=False)
    losses: list[float] = field(repr=False)
    before: float
    after: float
    evaluations: int
    backwards: int
    recompute: bool
    seconds: float
    training: LoraTraining

    def text(self, peak_megabytes: int | None = None) -> str:
        """What the LoRA has learnt and what that cost, in lines of text."""
        training = self.training
        lines = [
            f"rank {training.rank}, {training.steps} steps of {training.batch_size} noise levels, "
            f"learning rate {training.learning_rate:g}, seed {training.seed}",
            f"loss at {PROBES} fixed noise levels: {self.before:.4f} before, {self.after:.4f} after",
            f"{self.evaluations} network evaluations, {self.backwards} backward passes, {self.seconds:.1f} s",
        ]
        return "\n".join([*lines, *memory_lines(peak_megabytes, self.recompute, training.recompute)])
