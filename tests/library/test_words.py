"""Prompts as words: where they stand, how they are found, and what the user is told when they are not."""

from __future__ import annotations

import pytest

from retrace.core.errors import RetraceError
from retrace.core.prompt import Prompt, Word, parse_values, parse_words, read_prompt


def pieces(*words: str, length: int = 77) -> list[str | None]:
    """Start, the byte-pair pieces (``"chi|huahua"`` is one word of two), end and padding."""
    middle = [
        piece + ("</w>" if last else "")
        for word in words
        for piece, last in ((p, i == word.count("|")) for i, p in enumerate(word.split("|")))
    ]
    return [None, *middle, *[None] * (length - 1 - len(middle))]


def prompt(text: str, *words: str, length: int = 77) -> Prompt:
    return read_prompt(text, pieces(*(words or text.split()), length=length))


def test_pieces_become_words() -> None:
    read = prompt("a Chihuahua, asleep", "a", "chi|huahua", ",", "asleep")
    assert read.words == (Word("a", (1,)), Word("chihuahua", (2, 3)), Word(",", (4,)), Word("asleep", (5,)))
    assert (read.length, read.end) == (77, 6)
    assert read.find("Chihuahua") == (2, 3)
    assert read.find("chihuahua, asleep") == (2, 3, 4, 5)
    assert read.spaced() == [("a", (1,)), ("Chihuahua,", (2, 3, 4)), ("asleep", (5,))]


def test_letters_beyond_ascii_are_read_as_they_are_written() -> None:
    """CLIP's pieces are bytes in disguise, and a letter may even be cut in two."""
    read = prompt("a café — 猫", "a", "cafÃ©", "âĢĶ", "ç|Į«")
    assert [word.text for word in read.words] == ["a", "café", "—", "猫"]
    assert read.find("Café") == (2,) and read.find("猫") == (4, 5)


def test_a_word_that_comes_twice_is_found_twice() -> None:
    assert prompt("a cat and a dog").find("a") == (1, 4)


def test_a_second_chunk_goes_on_where_it_stands() -> None:
    read = read_prompt("...", [*pieces("a", "cat"), *pieces("on", "sand")])
    assert read.length == 154
    assert read.find("sand") == (79,)


def test_the_empty_prompt_has_no_words() -> None:
    read = read_prompt("", [None] * 77)
    assert read.words == () and read.end == 1 and not read.has("cat")
    with pytest.raises(RetraceError, match="none at all"):
        read.find("cat")


def test_a_missing_word_lists_those_there_are() -> None:
    with pytest.raises(RetraceError, match=r"'dog' is not in the prompt 'a cat on sand'.*'a', 'cat', 'on', 'sand'"):
        prompt("a cat on sand").find("dog")


def test_lists_and_values() -> None:
    assert parse_words("circle, red star;\n sand ,") == ["circle", "red star", "sand"]
    assert parse_values("weights", "red: 2, big star: -0.5") == {"red": 2.0, "big star": -0.5}
    assert parse_values("weights", "") == {}


@pytest.mark.parametrize("text", ["red", "red: lots", ": 2", "red 2"])
def test_values_that_are_none_are_shown(text: str) -> None:
    with pytest.raises(RetraceError, match=r"weights: '.*' cannot be read.*word: number"):
        parse_values("weights", text)
