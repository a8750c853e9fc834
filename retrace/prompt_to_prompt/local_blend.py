"""Local blend: only what some words attend to may differ from the source (Hertz et al. 2023, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import RetraceError
from ..core.host import AttentionCall
from ..core.prompt import Prompt

Places = tuple[tuple[int, ...], ...]
"""For the source and each target: where the chosen words stand in the embedding."""


@dataclass(frozen=True)
class LocalBlend:
    """``words`` select what may change in every picture of the batch, ``subtract`` what may not after all.

    A cell belongs to the words where their map, relative to its own maximum, exceeds ``threshold``; so it may change
    when it belongs to them in the source or in the target. Before the share ``start`` of the steps nothing is blended.
    """

    words: Places
    subtract: Places = ()
    threshold: float = 0.3
    subtract_threshold: float = 0.3
    start: float = 0.2

    def __post_init__(self) -> None:
        for name in ("threshold", "subtract_threshold", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise RetraceError(f"Local blend: {name} is {getattr(self, name)}; it needs a number from 0 to 1.")


def local_blend(
    prompts: Sequence[Prompt],
    words: Sequence[str],
    subtract: Sequence[str] = (),
    threshold: float = 0.3,
    start: float = 0.2,
) -> LocalBlend | None:
    """A local blend from words; each must be in at least one of ``prompts`` (the source first). None without words.

    Raises:
        RetraceError: a word that no prompt has (lists those of the source), words to keep without words to change.
    """
    if not words:
        if subtract:
            raise RetraceError(
                "Local blend has words that stay but none that may change. Name the words of what may change as well."
            )
        return None
    return LocalBlend(_places(prompts, words), _places(prompts, subtract), threshold, threshold, start)


def _places(prompts: Sequence[Prompt], words: Sequence[str]) -> Places:
    rows: list[set[int]] = [set() for _ in prompts]
    for word in words:
        missing = 0
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt.has(word):
                row.update(prompt.find(word))
            else:
                missing += 1
        if missing == len(prompts):
            prompts[0].find(word)  # raises, and lists the words
    return tuple(tuple(sorted(row)) for row in rows)


class WordMaps:
    """Cross-attention maps of the chosen words, summed over the steps of a run, by resolution."""

    def __init__(self, blend: LocalBlend) -> None:
        self.blend = blend
        self._sums: dict[tuple[int, int], Tensor] = {}  # [2, P, h, w]: words and subtracted words
        self._calls: dict[tuple[int, int], int] = {}

    def add(self, call: AttentionCall, maps: Tensor) -> None:
        """Note the maps ``[P, heads, N, T]`` of one layer, as they were used."""
        size = (call.height, call.width)
        kinds = []
        for places in (self.blend.words, self.blend.subtract):
            rows = [
                maps[row][..., list(which)].sum(-1).mean(0).view(size) if which else maps.new_zeros(size)
                for row, which in enumerate(places or ((),) * len(maps))
            ]
            kinds.append(torch.stack(rows))
        new = torch.stack(kinds).float()
        self._sums[size] = self._sums[size] + new if size in self._sums else new
        self._calls[size] = self._calls.get(size, 0) + 1

    def mean(self, height: int, width: int) -> Tensor:
        """Mean maps ``[2, P, h, w]`` of the layers with a quarter of the latent's side, but at least 16 x 16 cells.

        For a picture of 512 px in SD1.5 these are the reference's. Where a model has no such layer it is the nearest
        one that does cross-attention.
        """
        if not self._sums:
            raise RetraceError("No cross-attention has run yet, so there are no maps to blend by.")

        wanted = max(height * width / 16, 16 * 16)

        def distance(size: tuple[int, int]) -> float:
            return abs(math.log(size[0] * size[1] / wanted))

        size = min(self._sums, key=distance)
        return self._sums[size] / self._calls[size]

    def mask(self, height: int, width: int) -> Tensor:
        """Where each target may differ from the source, ``[P, 1, height, width]`` of 0 and 1."""
        wanted, unwanted = self.mean(height, width)
        spread = F.max_pool2d(wanted[:, None], 3, stride=1, padding=1)
        mask = _above(spread, (height, width), self.blend.threshold)
        mask = mask[:1] | mask
        if any(self.blend.subtract):
            less = _above(unwanted[:, None], (height, width), self.blend.subtract_threshold)
            mask = mask & ~(less[:1] | less)
        return mask.float()

    def blend_latents(self, x: Tensor, done: int, steps: int) -> Tensor:
        """The batch ``[P, C, h, w]`` when ``done`` of ``steps`` are done, with the source outside the mask."""
        if done <= int(self.blend.start * steps):
            return x
        mask = self.mask(x.shape[-2], x.shape[-1]).to(x)
        return x[:1] + mask * (x - x[:1])


def _above(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Which cells of ``maps`` ``[P, 1, h, w]``, brought to ``size``, exceed ``threshold`` of their maximum."""
    large = F.interpolate(maps, size=size)  # nearest, as the reference
    return large / large.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) > threshold
