"""Several prompts as one CONDITIONING for a batch, and the words that core's tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...core.errors import UnsupportedModel
from ...core.prompt import Prompt, read_prompt
from . import plain
from .types import Clip, ConditioningList

MARK = "retrace_prompts"
"""In the options of a CONDITIONING: it holds a prompt for each image of an edit."""

Tokens = dict[str, list[list[Any]]]


class TokenisedPrompts:
    """Prompts for the images of a batch, cut into tokens once, with equally many chunks for each.

    Raises:
        UnsupportedModel: from :meth:`read` for text encoders that are not CLIP's, from :meth:`encode` for LoRA hooks
            with a schedule.
    """

    def __init__(self, clip: Clip, prompts: Sequence[str]) -> None:
        self.clip = clip
        self.prompts = tuple(prompts)
        self.tables = _tokenize(clip, prompts)

    def read(self) -> list[Prompt]:
        """The words of the prompts and their places in what :meth:`encode` makes of all of them."""
        encoder = _tokenizers(self.clip, self.tables[0])
        return [
            read_prompt(text, _pieces(table, encoder)) for text, table in zip(self.prompts, self.tables, strict=True)
        ]

    def encode(self) -> ConditioningList:
        """CONDITIONING with one entry whose embedding is ``[P, T, D]``: prompt p for image p of a batch.

        Core's syntax for weights and embeddings works. Shorter prompts are filled up with chunks of the empty prompt.
        """
        with torch.inference_mode():
            parts = [self.clip.encode_from_tokens_scheduled(table) for table in self.tables]
        if any(len(part) != 1 for part in parts):
            raise UnsupportedModel(
                "The text encoder carries LoRA hooks with a schedule, which gives several conditions for one prompt. "
                "Connect a CLIP without them."
            )
        embeddings = torch.cat([plain.alias(part[0][0]) for part in parts])
        options = {**parts[0][0][1], MARK: True}
        pooled = [part[0][1].get("pooled_output") for part in parts]
        if all(p is not None for p in pooled):
            options["pooled_output"] = torch.cat([plain.alias(p) for p in pooled])
        return [[embeddings, options]]


def _tokenize(clip: Clip, prompts: Sequence[str]) -> list[Tokens]:
    """Core's token tables, with equally many chunks for each prompt."""
    tables: list[Tokens] = [clip.tokenize(prompt, return_word_ids=True) for prompt in prompts]
    empty: Tokens = clip.tokenize("", return_word_ids=True)
    most = max(len(chunks) for table in tables for chunks in table.values())
    return [
        {name: [*chunks, *empty[name] * (most - len(chunks))] for name, chunks in table.items()} for table in tables
    ]


def _tokenizers(clip: Clip, table: Tokens) -> tuple[str, Any]:
    """Name of the encoder in the table, and its tokenizer; two CLIP encoders cut a prompt alike."""
    for name in table:
        tokenizer = getattr(clip.tokenizer, f"clip_{name}", None)
        if tokenizer is not None and hasattr(tokenizer, "inv_vocab"):
            return name, tokenizer
    raise UnsupportedModel(
        f"The text encoders of this model ({', '.join(table)}) are not CLIP's, and the maps of words are only known "
        "for those. Use a model of the SD1.5, SD2 or SDXL kind."
    )


def _pieces(table: Tokens, encoder: tuple[str, Any]) -> list[str | None]:
    name, tokenizer = encoder
    pieces: list[str | None] = []
    for token, _, word in (entry for chunk in table[name] for entry in chunk):
        if word == 0:  # start, end and padding
            pieces.append(None)
        elif isinstance(token, int):
            pieces.append(str(tokenizer.inv_vocab[token]))
        else:  # a textual-inversion embedding, which stands for a word without letters of its own
            pieces.append("embedding</w>")
    return pieces
