"""Local blend: only what some words attend to may differ from the source (Hertz et al. 2023, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import InvalidSetting, RetraceError
from ..core.host import AttentionCall
from ..core.prompt import Prompt

Places = tuple[tuple[int, ...], ...]
"""For the source and each target: where the chosen words stand in the embedding."""


@dataclass(frozen=True)
class LocalBlend:
    """``words`` select what may change in every image of the batch, ``subtract`` what may not after all.

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
                raise InvalidSetting(f"Local blend: {name} is {getattr(self, name)}; it needs a number from 0 to 1.")


@dataclass(frozen=True)
class BlendWords:
    """A local blend in words: what may change, and what stays although it overlaps.

    Each is a list of words for all prompts, or one list for each prompt, the source first. ``keep_threshold`` None is
    ``threshold``.
    """

    words: Sequence[str] | Sequence[Sequence[str]] = ()
    keep: Sequence[str] | Sequence[Sequence[str]] = ()
    threshold: float = 0.3
    keep_threshold: float | None = None
    start: float = 0.2


def local_blend(prompts: Sequence[Prompt], asked: BlendWords) -> LocalBlend | None:
    """A local blend from words; each must be in at least one of ``prompts`` (the source first). None without words.

    Raises:
        RetraceError: a word that no prompt has (lists those of the source), lists for another number of prompts, or
            words to keep without words to change.
    """
    words, keep = (_by_prompt(given, len(prompts)) for given in (asked.words, asked.keep))
    if not any(words):
        if any(keep):
            raise RetraceError(
                "Local blend has words that stay but none that may change. Name the words of what may change as well."
            )
        return None
    keep_threshold = asked.threshold if asked.keep_threshold is None else asked.keep_threshold
    return LocalBlend(_places(prompts, words), _places(prompts, keep), asked.threshold, keep_threshold, asked.start)


def _by_prompt(given: Sequence[str] | Sequence[Sequence[str]], prompts: int) -> list[tuple[str, ...]]:
    """The words to look for in each prompt."""
    lists = [(words,) if isinstance(words, str) else tuple(words) for words in given]
    if all(isinstance(words, str) for words in given):
        return [tuple(word for (word,) in lists)] * prompts
    if len(lists) != prompts:
        raise RetraceError(
            f"Local blend has words for {len(lists)} prompts, but there are {prompts} (the source first). Give one "
            "list for all of them, or one for each."
        )
    return lists


def _places(prompts: Sequence[Prompt], words: Sequence[Sequence[str]]) -> Places:
    rows: list[set[int]] = [set() for _ in prompts]
    found: set[str] = set()
    for row, prompt, own in zip(rows, prompts, words, strict=True):
        for word in own:
            if prompt.has(word):
                row.update(prompt.find(word))
                found.add(word)
    for prompt, own in zip(prompts, words, strict=True):
        for word in own:
            if word not in found:
                prompt.find(word)  # raises, and lists the words
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

        For an image of 512 px in SD1.5 these are the reference's. Where a model has no such layer it is the nearest
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
