"""A prompt as words, and where each of them stands in the text embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InvalidSetting, RetraceError

END_OF_WORD = "</w>"  # how CLIP's byte-pair vocabulary marks the last piece of a word
# Its pieces are bytes: one that is no printable character of Latin-1 is written as the next free one from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
# The classes of characters that CLIP's tokenizer never joins into one word (Radford et al. 2021).
_CLASSES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")


@dataclass(frozen=True)
class Word:
    """One word, or a run of punctuation, and its places along the token axis of the embedding."""

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """``text`` as the model reads it: ``words`` in order, in an embedding of ``length`` tokens (77 a chunk)."""

    text: str
    words: tuple[Word, ...]
    length: int

    @property
    def end(self) -> int:
        """The place behind the last word: that of the end token."""
        return self.words[-1].positions[-1] + 1 if self.words else 1

    def find(self, phrase: str) -> tuple[int, ...]:
        """The places of all occurrences of ``phrase`` (one word or several in a row, upper or lower case).

        Raises :class:`RetraceError` that lists the prompt's words when it is not there.
        """
        found = self._places(phrase)
        if not found:
            listed = ", ".join(f"'{text}'" for text in dict.fromkeys(w.text for w in self.words)) or "none at all"
            raise RetraceError(
                f"'{phrase.strip()}' is not in the prompt '{self.text}'. Its words are: {listed}. Write it as it "
                "stands there."
            )
        return found

    def has(self, phrase: str) -> bool:
        """Whether :meth:`find` finds it."""
        return bool(self._places(phrase))

    def _places(self, phrase: str) -> tuple[int, ...]:
        wanted = _CLASSES.findall(phrase.lower())
        texts = [word.text for word in self.words]
        found: list[int] = []
        for start in range(len(texts) - len(wanted) + 1):
            if wanted and texts[start : start + len(wanted)] == wanted:
                found += [p for word in self.words[start : start + len(wanted)] for p in word.positions]
        return tuple(found)

    def spaced(self) -> list[tuple[str, tuple[int, ...]]]:
        """The words between spaces (``"cat,"`` is one) with their places, as the reference's code counts them."""
        groups: list[tuple[str, tuple[int, ...]]] = []
        rest = iter(self.words)
        for text in self.text.split(" "):
            positions: list[int] = []
            length = 0
            while length < len(text):
                word = next(rest, None)
                if word is None:
                    break
                positions += word.positions
                length += len(word.text)
            groups.append((text, tuple(positions)))
        return groups


def read_prompt(text: str, pieces: Sequence[str | None]) -> Prompt:
    """The words of ``text`` from its byte-pair ``pieces``, one for each place of the embedding.

    None stands for start, end and padding. A piece that ends a word carries CLIP's mark ``</w>``; one without the mark
    in front of a special token ends its word as well (a textual-inversion embedding, for example).
    """
    words: list[Word] = []
    letters, positions = "", []
    for place, piece in enumerate(pieces):
        if piece is not None:
            letters += piece.removesuffix(END_OF_WORD)
            positions.append(place)
        if positions and (piece is None or piece.endswith(END_OF_WORD)):
            words.append(Word(_decoded(letters), tuple(positions)))
            letters, positions = "", []
    if positions:
        words.append(Word(_decoded(letters), tuple(positions)))
    return Prompt(text, tuple(words), len(pieces))


def _decoded(letters: str) -> str:
    """The text that ``letters`` of byte-pair pieces stand for: those of an accented letter are two."""
    if all(letter in _BYTES for letter in letters):
        return bytes(_BYTES[letter] for letter in letters).decode("utf-8", "replace")
    return letters


def parse_words(text: str) -> list[str]:
    """``"circle, red star"`` as a list of phrases: commas, semicolons and line ends separate."""
    return [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]


def parse_word_lists(text: str) -> list[str] | list[list[str]]:
    """Words for all prompts, ``"circle, square"``, or with bars a list for each of them, ``"circle | square"``."""
    lists = [parse_words(part) for part in text.split("|")]
    return lists[0] if len(lists) == 1 else lists


def parse_values(name: str, text: str) -> dict[str, float]:
    """``"red: 2, star: -1"`` as numbers by phrase.

    Raises :class:`InvalidSetting` that shows the part which is not of that form.
    """
    values: dict[str, float] = {}
    for part in parse_words(text):
        phrase, mark, number = part.rpartition(":")
        try:
            if not mark or not phrase.strip():
                raise ValueError
            values[phrase.strip()] = float(number)
        except ValueError:
            raise InvalidSetting(
                f"{name}: '{part}' cannot be read. Write 'word: number', several of them separated by commas, for "
                "example 'red: 2, star: 0.5'."
            ) from None
    return values
