"""Text conditions of CLIP models: prompts in chunks of 75 tokens, one text encoder (SD 1.x, 2.x) or two (SDXL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.prompt import Prompt, read_prompt
from .types import TextModel, Tokenizer


@dataclass(frozen=True)
class TextCondition:
    """Prompts as the network takes them: token embeddings ``[B, T, D]``, and for SDXL the pooled vector ``[B, P]``.

    B is 1, or the number of images.
    """

    embedding: Tensor
    pooled: Tensor | None = None

    def with_embedding(self, embedding: Tensor) -> TextCondition:
        """The same condition with other token embeddings; gradients flow to them."""
        return replace(self, embedding=embedding)

    def to(self, device: torch.device) -> TextCondition:
        return TextCondition(self.embedding.to(device), None if self.pooled is None else self.pooled.to(device))


class TextEncoder:
    """CLIP text encoders with their tokenizers; ``final`` says whether the last, normalised layer is the embedding.

    SD 1.x and 2.x condition on the last layer of their text model (SD 2.x ships without the layer it leaves out), SDXL
    on the last but one of two models, side by side, plus the projected end token of the second one.

    They run on ``device`` and return to where they were: those of SDXL take 1.6 GB, for a moment only.
    """

    def __init__(self, encoders: Sequence[TextModel], tokenizers: Sequence[Tokenizer], device: torch.device) -> None:
        self.device = device
        self.encoders = list(encoders)
        self.tokenizers = list(tokenizers)
        self.final = len(self.encoders) == 1

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        """One condition for all ``prompts``; shorter ones are filled up with chunks of the empty prompt."""
        embeddings, pooled = [], None
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            rows = self._rows(tokenizer, prompts, encoder.config.max_position_embeddings)
            home = encoder.device
            encoder.to(self.device)
            try:
                out = encoder(torch.tensor(rows, device=self.device), output_hidden_states=not self.final)
            finally:
                encoder.to(home)
            hidden = out.last_hidden_state if self.final else out.hidden_states[-2]
            embeddings.append(hidden.float().reshape(len(prompts), -1, hidden.shape[-1]))
            if not self.final:
                pooled = getattr(out, "text_embeds", None)
        if pooled is not None:
            pooled = pooled[:: len(pooled) // len(prompts)].float()  # those of the first chunks
        # Two encoders may cut a prompt differently only if their vocabularies differ, which those of SDXL do not.
        return TextCondition(torch.cat(embeddings, -1), pooled)

    def read(self, prompts: Sequence[str]) -> list[Prompt]:
        """The words of the prompts, as they stand in the embeddings of one call with all of them."""
        tokenizer = self.tokenizers[0]
        rows = self._rows(tokenizer, prompts, self.encoders[0].config.max_position_embeddings)
        chunks = len(rows) // len(prompts)
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        read = []
        for number, text in enumerate(prompts):
            ids = [token for row in rows[number * chunks : (number + 1) * chunks] for token in row]
            pieces = tokenizer.convert_ids_to_tokens(ids)
            read.append(read_prompt(text, [None if i in special else p for i, p in zip(ids, pieces, strict=True)]))
        return read

    @staticmethod
    def _rows(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids, the same number of rows for each prompt."""
        found = []
        for prompt in prompts:
            tokens = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            found.append(_chunks(tokens, tokenizer, length))
        empty, most = _chunks([], tokenizer, length), max(map(len, found))
        return [row for rows in found for row in rows + empty * (most - len(rows))]


def _chunks(tokens: list[int], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """A prompt in rows of ``length``, at least one: start, up to ``length - 2`` tokens, end, padding."""
    room = length - 2
    parts = [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[start, *part, end, *[pad] * (room - len(part))] for part in parts]
