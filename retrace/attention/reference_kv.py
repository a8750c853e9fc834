"""Self-attention of an edit that reads the keys and values of a reference image.

DragDiffusion (Shi et al. 2024, arXiv 2306.14435, "reference-latent-control") denoises the dragged latent beside the
one it came from. In the later self-attention layers the queries stay the edit's own, so it decides what goes where, and
keys and values are the reference's, so what it shows looks as it did. That is the mutual self-attention of MasaCtrl
(Cao et al. 2023, arXiv 2304.08465).

The batch is ``[reference, edit, edit ...]``. The reference is never touched: it comes out as if it were alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ..core.errors import InvalidInput, InvalidSetting, Remedy
from ..core.host import AttentionCall, Row


@dataclass(frozen=True)
class ReferenceKV:
    """An :class:`AttentionHook`: every edit of a batch reads keys and values of image 0.

    Each condition is a batch of its own: the negative of an edit reads the negative of the reference. Cross-attention
    passes untouched.

    Args:
        first_layer: running number (:attr:`AttentionCall.index`) of the first layer that is controlled. The authors use
            10 of the 16 of SD1.5; :func:`default_first_layer` finds the corresponding one in other UNets.
        last_layer: number of the last one, itself included; None is the last of the network.
        start: noise level at which it begins; a step at exactly this level is within.
        end: noise level at which it ends, likewise.
    """

    first_layer: int
    last_layer: int | None = None
    start: float = math.inf
    end: float = 0.0

    def __call__(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Raises :class:`InvalidInput` for a batch without an edit."""
        if call.kind != "self" or not self.applies(call.index, call.sigma):
            return call.attend(q, k, v)
        rows = list(reference_rows(call.rows))
        return call.attend(q, k[rows], v[rows])

    def applies(self, layer: int, sigma: float) -> bool:
        """Whether the layer of that running number is controlled at noise level ``sigma``."""
        within = self.first_layer <= layer and (self.last_layer is None or layer <= self.last_layer)
        return within and self.end <= sigma <= self.start


@lru_cache(maxsize=64)
def reference_rows(rows: tuple[Row, ...]) -> tuple[int, ...]:
    """For every row of a pass the number of the row that holds its reference: image 0 of the same condition.

    A condition may be there several times, once for each entry of a conditioning: the n-th time an image comes up, its
    reference is image 0 the n-th time. The order of the rows does not matter.

    Raises:
        InvalidInput: there is no edit, or a reference is missing.
    """
    require_edits(1 + max(row.image for row in rows))
    references: defaultdict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row.image == 0:
            references[row.cond].append(number)
    met: Counter[Row] = Counter()
    found = []
    for row in rows:
        if met[row] >= len(references[row.cond]):
            raise InvalidInput(
                "An edit is denoised without its reference, image 0 of its batch, so it has nothing to read from. "
                "Denoise the batch as a whole."
            )
        found.append(references[row.cond][met[row]])
        met[row] += 1
    return tuple(found)


def require_edits(images: int) -> None:
    """Raises :class:`InvalidInput` for a batch of fewer than two images."""
    if images < 2:
        raise InvalidInput(
            f"The sampler works on a batch of {images}, but a batch [reference, edit, ...] is needed: the edits take "
            "keys and values from the first image.",
            Remedy.JOIN_REFERENCE,
        )


def default_first_layer(blocks: Sequence[str]) -> int:
    """The first layer of the two finest decoder levels that have attention, as the authors' choice for SD1.5 is.

    ``blocks`` names the block of every transformer block of a UNet in the order they run ("down.0", "mid.0", "up.2").
    The answer is 10 of the 16 of SD1.x and SD2.x, 34 of the 70 of SDXL, 3 of the 7 of Pebble.

    Raises:
        InvalidSetting: a network whose decoder has no attention, so that the layer must be given.
    """
    levels = sorted({int(block.removeprefix("up.")) for block in blocks if block.startswith("up.")})
    if not levels:
        raise InvalidSetting(
            "This UNet has no attention in its decoder, so no layer to begin with can be chosen for it. Set "
            f"first_layer to a number from 0 to {max(len(blocks) - 1, 0)}."
        )
    return list(blocks).index(f"up.{levels[-2:][0]}")
