"""Proximal guidance: ignore what guidance would change only a little (Han et al. 2024, "ProxEdit")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..core.errors import InvalidSetting

Kind = Literal["hard", "soft"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Proximal:
    """The difference between the conditional and the unconditional estimate, without its small entries.

    What lies below the ``quantile`` of the magnitudes of an image is set to 0: ``hard`` keeps the rest as it is (the
    paper's l0), ``soft`` takes the threshold off it (l1). Together with negative-prompt inversion, where that
    difference is the edit itself, it leaves alone what the edit is not about.
    """

    quantile: float = 0.7
    kind: Kind = "hard"

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 1:
            raise InvalidSetting(f"Proximal guidance: the quantile is {self.quantile}; it needs 0 (off) up to below 1.")
        if self.kind not in KINDS:
            raise InvalidSetting(f"Proximal guidance: got '{self.kind}', but one of {', '.join(KINDS)} is needed.")

    def shrink(self, change: Tensor) -> Tensor:
        """``change`` ``[B, C, h, w]`` without its small entries, image by image."""
        size = change.abs()
        # kthvalue has no limit on the number of entries, as torch.quantile has.
        flat = size.flatten(1).float()
        rank = min(int(self.quantile * flat.shape[1]) + 1, flat.shape[1])
        threshold = flat.kthvalue(rank, dim=1).values.view(-1, *[1] * (change.ndim - 1)).to(change)
        if self.quantile == 0:
            return change
        kept = (size - threshold).clamp(min=0) * change.sign() if self.kind == "soft" else change
        return kept * (size > threshold)

    def guided(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance with the shrunken difference."""
        return uncond + scale * self.shrink(cond - uncond)
