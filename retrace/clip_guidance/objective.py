"""The loss of CLIP guidance: words, range and background, summed over a batch whose pictures do not meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_image, check_mask
from ..core.errors import InvalidImage, RetraceError
from ..models.clip.model import ImageTextModel
from .losses import background_mse, range_loss, spherical_distance
from .views import Augmentations, View, resized, views


@dataclass(frozen=True)
class Weights:
    """How much each loss counts. The defaults are those of the authors' code; there the background is off (0).

    Its own values are 1000 for ``background_lpips`` and 10000 for ``background_mse``.
    """

    clip: float = 1000.0
    range: float = 50.0
    background_lpips: float = 0.0
    background_mse: float = 0.0


@dataclass(frozen=True)
class ClipGuidance:
    """What a picture shall become, as a loss.

    ``clip`` looks, ``prompt`` says what it shall see. ``mask`` ``[B or 1, H, W]`` in 0..1, 1 = edit, is the region that
    the words are about and the hole in the background; without one it is the whole picture. ``source``
    ``[B or 1, H, W, 3]`` in 0..1 is what the background losses compare with, ``lpips`` the network of
    :func:`retrace.metrics.load_lpips`.

    ``view``: the CLIP sees the ``region`` alone (the paper), or the ``picture`` with what is around it.

    ``parity`` follows the authors' code where it differs from the paper: the mask before the augmentations, the source
    unmasked in the background losses, and a mix of clean estimate and noisy latent (see :mod:`.step`). Not followed:
    its mean square of the background is one mean over the batch, where here each picture has its own.

    Raises:
        InvalidImage: a broken mask or source, or sizes that differ.
        RetraceError: background weights without a source or a mask, LPIPS without its network, an empty prompt.
    """

    clip: ImageTextModel
    prompt: str
    mask: Tensor | None = None
    source: Tensor | None = None
    lpips: Any = None
    weights: Weights = field(default_factory=Weights)
    augmentations: Augmentations = field(default_factory=Augmentations)
    view: View = "region"
    parity: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RetraceError(
                "prompt: it is empty, and there is nothing to guide to. Say in words what the region shall show, or "
                "take the node out: to remove an object, sample with the words of its surroundings."
            )
        mask = None if self.mask is None else check_mask("mask", self.mask)
        source = None if self.source is None else check_image("source", self.source)
        if mask is not None and source is not None and source.shape[1:3] != mask.shape[1:]:
            raise InvalidImage(
                f"mask: got {list(mask.shape)}, but the source is {list(source.shape)}. Both must have the same height "
                "and width."
            )
        object.__setattr__(self, "mask", mask)  # as checked: without what resizing overshot
        object.__setattr__(self, "source", source)
        if not any(vars(self.weights).values()):
            raise RetraceError("All weights are 0, so there is nothing to guide. Raise the strength, or take it out.")
        background = self.weights.background_lpips or self.weights.background_mse
        if background and (self.source is None or self.mask is None):
            raise RetraceError(
                "The background losses compare with the source outside the mask, and one of the two is missing. "
                "Connect both, or set background_lpips and background_mse to 0."
            )
        if self.weights.background_lpips and self.lpips is None:
            raise RetraceError("background_lpips: it needs the LPIPS network, and none was loaded.")

    def words(self) -> Tensor:
        """The prompt as a unit vector ``[1, D]`` on the CLIP's device."""
        with torch.inference_mode(False), torch.no_grad():
            return self.clip.encode_texts([self.prompt])

    def loss(self, picture: Tensor, words: Tensor, generator: torch.Generator, shown: Tensor | None = None) -> Tensor:
        """The weighted losses ``[B]`` of ``picture`` ``[B, 3, H, W]`` around -1..1.

        ``words`` are those of :meth:`words`, ``generator`` draws the views. ``shown`` takes the place of the picture
        where CLIP and background look, which :mod:`.step` needs for ``parity``.
        """
        shown = picture if shown is None else shown
        mask = self._mask_for(picture)
        total = self.weights.range * range_loss(picture) if self.weights.range else picture.new_zeros(len(picture))
        if self.weights.clip:
            seen = views(
                shown,
                mask if self.view == "region" else None,
                self.clip.size,
                self.augmentations,
                generator,
                self.parity,
            )
            embedded = self.clip.encode_pixels(seen / 2 + 0.5)
            distances = spherical_distance(embedded, words.to(embedded.device)).to(total.device)
            total = total + self.weights.clip * distances.reshape(-1, len(shown)).mean(0)
        if mask is not None and self.source is not None:
            total = total + self._background(shown, mask)
        return total

    def _background(self, shown: Tensor, mask: Tensor) -> Tensor:
        assert self.source is not None
        if len(self.source) not in (1, len(shown)):
            raise InvalidImage(
                f"CLIP Guidance has {len(self.source)} sources for a batch of {len(shown)}: give one, or one for each."
            )
        source = resized(self.source.movedim(-1, 1).to(shown) * 2 - 1, _size(shown))
        total = shown.new_zeros(len(shown))
        if self.weights.background_mse:
            total = total + self.weights.background_mse * background_mse(shown, source, mask, self.parity)
        if self.weights.background_lpips:
            target = source if self.parity else source * (1 - mask)
            network = self.lpips.to(shown.device)
            total = total + self.weights.background_lpips * network(shown * (1 - mask), target).reshape(-1)
        return total

    def _mask_for(self, picture: Tensor) -> Tensor | None:
        """The mask ``[B or 1, 1, H, W]`` at the size of ``picture``."""
        if self.mask is None:
            return None
        if len(self.mask) not in (1, len(picture)):
            raise InvalidImage(
                f"CLIP Guidance has {len(self.mask)} masks for a batch of {len(picture)}: give one, or one for each."
            )
        return resized(self.mask[:, None].to(picture), _size(picture))


def _size(picture: Tensor) -> tuple[int, int]:
    return picture.shape[2], picture.shape[3]
