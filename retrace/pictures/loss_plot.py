"""How the loss of a training went, as an image and in numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .fonts import font_for

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM, _TEXT = (640, 320), 64, 16, 16, 40, 14
_PAPER, _INK, _LINE, _POINT, _MEAN = (250, 250, 248), (24, 24, 26), (225, 225, 223), (165, 190, 220), (31, 95, 168)


def loss_picture(losses: Sequence[float]) -> Tensor:
    """``[1, H, W, 3]`` in 0..1: a point for every step, and the running mean, over a logarithmic scale.

    The losses are positive; one of 0 is drawn at the lower edge.
    """
    positive = [value for value in losses if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive)) * 4) / 4, math.ceil(math.log10(max(positive)) * 4) / 4
    high = max(high, low + 0.25)
    width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM

    def place(step: int, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return _LEFT + width * step / max(len(losses) - 1, 1), _TOP + height * (1 - share)

    picture = Image.new("RGB", _SIZE, _PAPER)
    draw = ImageDraw.Draw(picture)
    font = font_for("loss 0123456789", _TEXT)
    quarters = round((high - low) * 4)
    for quarter in range(0, quarters + 1, math.ceil(quarters / 5)):
        value = 10 ** (low + quarter / 4)
        y = place(0, value)[1]
        draw.line([(_LEFT, y), (_SIZE[0] - _RIGHT, y)], fill=_LINE)
        draw.text((_LEFT - 8, y), f"{value:.2g}", _INK, font, anchor="rm")
    draw.text((_LEFT, _SIZE[1] - _BOTTOM + 10), "1", _INK, font)
    draw.text((_SIZE[0] - _RIGHT, _SIZE[1] - _BOTTOM + 10), f"step {len(losses)}", _INK, font, anchor="ra")
    for step, value in enumerate(losses):
        x, y = place(step, value)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_POINT)
    means = [place(step, value) for step, value in enumerate(running_mean(losses))]
    for start, end in pairwise(means):
        draw.line([start, end], fill=_MEAN, width=2)
    return torch.from_numpy(np.array(picture)).float()[None] / 255


class RunningMean:
    """The mean of each value and the up to ``window - 1`` before it; single steps see one random noise level each."""

    def __init__(self, window: int = 20) -> None:
        self._newest: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """The mean with ``value`` as the newest."""
        self._newest.append(value)
        return math.fsum(self._newest) / len(self._newest)


def running_mean(losses: Sequence[float], window: int = 20) -> list[float]:
    """:class:`RunningMean` of all ``losses``, one after the other."""
    mean = RunningMean(window)
    return [mean.add(loss) for loss in losses]
