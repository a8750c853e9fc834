"""Which map of the source prompt belongs to which token of the target prompt (Hertz et al. 2023, section 3.2).

By default words are aligned by edit distance, so the two prompts need not have equally many. The reference's two
mappers, with their errors, are there for comparison (:func:`reference_token_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..core.errors import RetraceError
from ..core.prompt import Prompt

Mode = Literal["replace", "refine"]
MODES: tuple[Mode, ...] = get_args(Mode)
CHUNK = 77  # tokens of one pass through CLIP


@dataclass(frozen=True)
class TokenMap:
    """``mapper`` ``[S, T]``: how much of the map of source token s goes to target token t; ``taken`` ``[T]``: 1 where
    the target takes what is mapped, 0 where it keeps its own map (a new word).
    """

    mapper: Tensor
    taken: Tensor


class Aligner(Protocol):
    """What pairs the tokens of two prompts."""

    def __call__(self, source: Prompt, target: Prompt, mode: Mode) -> TokenMap: ...


def token_map(source: Prompt, target: Prompt, mode: Mode = "replace") -> TokenMap:
    """Align two prompts by the words that a shortest edit pairs.

    ``replace``: a word that stands where another stood takes over its map, so that the new thing lies where the old
    one lay; where the tokens differ in number, each gets an equal share of all. ``refine``: only equal words share
    maps, every other word keeps its own. In both modes added words keep their own map. Start and padding share
    theirs as well.
    """
    mapper = torch.zeros(source.length, target.length)
    old, new = ([word.text for word in prompt.words] for prompt in (source, target))
    for i, j in align(old, new, substitute=mode == "replace"):
        _share(mapper, source.words[i].positions, target.words[j].positions)
    occupied = {p for word in target.words for p in word.positions}
    for place in range(target.length):
        if place in occupied:
            continue
        # What is no word: start tokens by their chunk, end and padding by their distance from the last word.
        start = place < target.end and place % CHUNK == 0
        partner = place if start else place - target.end + source.end
        if 0 <= partner < source.length:
            mapper[partner, place] = 1
    return TokenMap(mapper, (mapper.sum(0) > 0).float())


def reference_token_map(source: Prompt, target: Prompt, mode: Mode = "replace") -> TokenMap:
    """Align two prompts exactly as the published code does (google/prompt-to-prompt), errors included.

    Raises:
        RetraceError: ``replace`` with different numbers of words.
    """
    return _reference_replace(source, target) if mode == "replace" else _reference_refine(source, target)


def align(source: Sequence[str], target: Sequence[str], substitute: bool) -> list[tuple[int, int]]:
    """Pairs of indices of a shortest edit from one sequence to the other (Needleman & Wunsch 1970).

    An insertion or deletion costs 1, and so does a substitution, which only ``substitute`` allows. Among equal ones
    substitutions come last: of "cat" -> "fluffy dog" it is the dog that takes the place of the cat.
    """
    rows, columns = len(source) + 1, len(target) + 1
    cost = [[float(i + j) if not i or not j else 0.0 for j in range(columns)] for i in range(rows)]

    def meet(i: int, j: int) -> float:
        if source[i - 1] == target[j - 1]:
            return 0.0
        return 1.0 if substitute else float("inf")

    for i in range(1, rows):
        for j in range(1, columns):
            cost[i][j] = min(cost[i - 1][j - 1] + meet(i, j), cost[i][j - 1] + 1, cost[i - 1][j] + 1)
    pairs = []
    i, j = rows - 1, columns - 1
    while i and j:
        if cost[i][j] == cost[i - 1][j - 1] + meet(i, j):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif cost[i][j] == cost[i][j - 1] + 1:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def _share(mapper: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """Hand the maps of one word's tokens to another's; what all of them attend together stays the same."""
    if len(source) == len(target):
        mapper[list(source), list(target)] = 1
    else:
        for place in target:
            mapper[list(source), place] = 1 / len(target)


def _reference_replace(source: Prompt, target: Prompt) -> TokenMap:
    """The reference's replacement mapper, errors included: once the last changed word is past, every token takes the
    map of the token at its own place, also where the words have moved."""
    words, new = source.spaced(), target.spaced()
    if len(words) != len(new):
        raise RetraceError(
            f"The reference replaces word by word, but '{source.text}' has {len(words)} words and '{target.text}' has "
            f"{len(new)}. Switch parity off, or use refine."
        )
    changed = [(a[1], b[1]) for a, b in zip(words, new, strict=True) if a[0] != b[0]]
    length = min(source.length, target.length)
    mapper = torch.zeros(source.length, target.length)
    i = j = number = 0
    while i < length and j < length:
        if number < len(changed) and changed[number][0][0] == i:
            before, after = changed[number]
            _share(mapper, before, after)
            number, i, j = number + 1, i + len(before), j + len(after)
        else:
            mapper[i if number < len(changed) else j, j] = 1
            i, j = i + 1, j + 1
    return TokenMap(mapper, torch.ones(target.length))


def _reference_refine(source: Prompt, target: Prompt) -> TokenMap:
    """The reference's refinement mapper: tokens (start and end among them) aligned so that most of them are equal;
    behind the end every token takes the map of its own place."""

    def tokens(prompt: Prompt) -> list[object]:
        # Pieces of equal words are equal tokens, and of different words hardly ever.
        pieces = [(word.text, n) for word in prompt.words for n in range(len(word.positions))]
        return ["start", *pieces, "end"]

    x, y = tokens(source), tokens(target)
    best = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    move = [["left"] * (len(y) + 1)] + [["up"] * (len(y) + 1) for _ in x]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            left, up = best[i][j - 1], best[i - 1][j]  # a gap costs nothing
            diagonal = best[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            best[i][j] = max(left, up, diagonal)
            move[i][j] = "left" if best[i][j] == left else "up" if best[i][j] == up else "diagonal"
    mapper = torch.zeros(source.length, target.length)
    i, j = len(x), len(y)
    while j:
        if move[i][j] == "diagonal":
            i, j = i - 1, j - 1
            mapper[i, j] = 1
        elif move[i][j] == "left":
            j -= 1
        else:
            i -= 1
    for place in range(len(y), min(source.length, target.length)):
        mapper[place, place] = 1
    return TokenMap(mapper, (mapper.sum(0) > 0).float())
