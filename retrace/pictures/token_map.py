"""The token map of an edit as an image: which word takes over whose attention map."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.prompt import Prompt
from ..prompt_to_prompt.control import PromptToPrompt, Target
from .convert import INK, LINE, PAPER, to_tensor
from .fonts import Font, drawable, font_for

_CELL, _TEXT, _MARGIN = 32, 16, 12
_TAKEN, _NEW = (31, 95, 168), (232, 160, 60)


def token_pictures(edit: PromptToPrompt) -> Tensor:
    """One table for each target, ``[targets, H, W, 3]`` in 0..1.

    Rows are the tokens of the source's words, columns those of the target's. The darker a cell, the more of the row's
    map goes to the column; an orange column is a new word, which keeps a map of its own.
    """
    pictures = [_table(edit.source, target) for target in edit.targets]
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    sheets = []
    for picture in pictures:
        sheet = Image.new("RGB", (width, height), PAPER)
        sheet.paste(picture, (0, 0))
        sheets.append(to_tensor(sheet))
    return torch.stack(sheets)


def _table(source: Prompt, target: Target) -> Image.Image:
    rows, columns = _tokens(source), _tokens(target.prompt)
    font = font_for("".join(text for text, _ in (*rows, *columns)), _TEXT)
    widest = [max((_label(text, font).width for text, _ in side), default=0) for side in (rows, columns)]
    left, top = (_MARGIN + width + 8 for width in widest)
    size = (left + _CELL * len(columns) + _MARGIN, top + _CELL * len(rows) + _MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (text, _) in enumerate(rows):
        label = _label(text, font)
        picture.paste(label, (left - 8 - label.width, top + i * _CELL + (_CELL - label.height) // 2))
    for j, (text, place) in enumerate(columns):
        label = _label(text, font).rotate(90, expand=True)
        picture.paste(label, (left + j * _CELL + (_CELL - label.width) // 2, top - 8 - label.height))
        taken = float(target.tokens.taken[place])
        for i, (_, giver) in enumerate(rows):
            share = float(target.tokens.mapper[giver, place]) * taken
            corner = (left + j * _CELL, top + i * _CELL)
            box = (*corner, corner[0] + _CELL, corner[1] + _CELL)
            draw.rectangle(box, fill=_mix(_TAKEN, share) if taken else _NEW, outline=LINE)
    return picture


def _tokens(prompt: Prompt) -> list[tuple[str, int]]:
    """A label and the place of every token; a word of several tokens is named once, the others carry dots."""
    return [(word.text if not n else "...", place) for word in prompt.words for n, place in enumerate(word.positions)]


def _label(text: str, font: Font) -> Image.Image:
    text = drawable(text, font)
    left, top, right, bottom = font.getbbox(text)
    label = Image.new("RGB", (max(1, round(right - left)), max(1, round(bottom - top))), PAPER)
    ImageDraw.Draw(label).text((-left, -top), text, fill=INK, font=font)
    return label


def _mix(colour: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(round(paper + share * (ink - paper)) for paper, ink in zip(PAPER, colour, strict=True))
