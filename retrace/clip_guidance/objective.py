"""The loss of CLIP guidance: words, range and background, summed over a batch whose images do not meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.checks import check_choice, check_image, check_mask
from ..core.errors import InvalidImage, InvalidInput, InvalidSetting
from ..models.clip.model import ImageTextModel
from .losses import background_mse, range_loss, reference_background_mse, spherical_distance
from .views import Augmentations, View, reference_views, resized, views

Shown = Literal["estimate", "mixed"]
Masking = Literal["moved", "first"]
Target = Literal["masked", "whole"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much each loss counts. The defaults are those of the authors' code; there the background is off (0).

    Its own values are 1000 for ``background_lpips`` and 10000 for ``background_mse``.
    """

    clip: float = 1000.0
    range: float = 50.0
    background_lpips: float = 0.0
    background_mse: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the losses look at an image. The defaults follow the paper; :meth:`reference` the authors' code.

    Args:
        shown: to the CLIP and the background losses: the clean ``"estimate"``, or that ``"mixed"`` with the noisy
            latent, see :class:`.step.GuidedRun`.
        mask: ``"moved"`` with the image into each view, or applied ``"first"``, see :func:`.views.reference_views`.
        source: in the background losses: ``"masked"`` as the image is, or ``"whole"``.

    Raises:
        InvalidSetting: another choice.
    """

    shown: Shown = "estimate"
    mask: Masking = "moved"
    source: Target = "masked"

    def __post_init__(self) -> None:
        check_choice("shown", self.shown, get_args(Shown))
        check_choice("mask", self.mask, get_args(Masking))
        check_choice("source", self.source, get_args(Target))

    @classmethod
    def reference(cls) -> Look:
        """That of the authors' code, where it differs from the paper.

        Not followed: its mean square of the background is one mean over the batch; here each image has its own.
        """
        return cls(shown="mixed", mask="first", source="whole")


@dataclass(frozen=True)
class ClipGuidance:
    """What an image is to become, as a loss.

    ``clip`` looks, ``prompt`` says what it should see. ``mask`` ``[B or 1, H, W]`` in 0..1, 1 = edit, is the region
    that the words are about and the hole in the background; without one it is the whole image. ``source``
    ``[B or 1, H, W, 3]`` in 0..1 is what the background losses compare with, ``lpips`` the network of
    :func:`retrace.metrics.load_lpips`. ``view``: the CLIP sees the ``region`` alone (the paper), or the ``picture``
    with what is around it.

    Raises:
        InvalidImage: a broken mask or source, or sizes that differ.
        InvalidInput: background weights without a source or a mask, LPIPS without its network, an empty prompt.
        InvalidSetting: another view, or weights that are all 0.
    """

    clip: ImageTextModel
    prompt: str
    mask: Tensor | None = None
    source: Tensor | None = None
    lpips: nn.Module | None = None
    weights: Weights = field(default_factory=Weights)
    augmentations: Augmentations = field(default_factory=Augmentations)
    view: View = "region"
    look: Look = field(default_factory=Look)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidInput(
                "prompt: it is empty, so there is nothing to guide towards. Say in words what the region should show. "
                "To remove an object, sample with the words of its surroundings and without this guidance."
            )
        check_choice("view", self.view, get_args(View))
        mask = None if self.mask is None else check_mask("mask", self.mask)
        source = None if self.source is None else check_image("source", self.source)
        if mask is not None and source is not None and source.shape[1:3] != mask.shape[1:]:
            raise InvalidImage(
                f"mask: got {list(mask.shape)}, but the source is {list(source.shape)}. Both must have the same height "
                "and width."
            )
        # As checked: without what resizing overshot.
        object.__setattr__(self, "mask", None if mask is None else _ordinary(mask))
        object.__setattr__(self, "source", None if source is None else _ordinary(source))
        if not any(vars(self.weights).values()):
            raise InvalidSetting("All weights are 0, so there is nothing to guide. Raise the strength, or take it out.")
        background = self.weights.background_lpips or self.weights.background_mse
        if background and (source is None or mask is None):
            raise InvalidInput(
                "The background losses compare with the source outside the mask, and one of the two is missing. "
                "Give both, or set background_lpips and background_mse to 0."
            )
        if self.weights.background_lpips and self.lpips is None:
            raise InvalidInput("background_lpips: it needs the LPIPS network, and none was loaded.")

    def words(self) -> Tensor:
        """The prompt as a unit vector ``[1, D]`` on the CLIP's device."""
        with torch.inference_mode(False), torch.no_grad():
            return self.clip.encode_texts([self.prompt])

    def loss(self, image: Tensor, words: Tensor, generator: torch.Generator, shown: Tensor | None = None) -> Tensor:
        """The weighted losses ``[B]`` of ``image`` ``[B, 3, H, W]`` around -1..1.

        ``words`` are those of :meth:`words`, ``generator`` draws the views. ``shown`` is what CLIP and background look
        at instead of the image, for a :class:`Look` at something ``"mixed"``.
        """
        shown = image if shown is None else shown
        mask = self._mask_for(image)
        total = self.weights.range * range_loss(image) if self.weights.range else image.new_zeros(len(image))
        if self.weights.clip:
            see = views if self.look.mask == "moved" else reference_views
            region = mask if self.view == "region" else None
            seen = see(shown, region, self.clip.size, self.augmentations, generator)
            embedded = self.clip.encode_pixels(seen / 2 + 0.5)
            distances = spherical_distance(embedded, words.to(embedded.device)).to(total.device)
            total = total + self.weights.clip * distances.reshape(-1, len(shown)).mean(0)
        if mask is not None and self.source is not None:
            total = total + self._background(shown, self.source, mask)
        return total

    def _background(self, shown: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        if len(source) not in (1, len(shown)):
            raise InvalidImage(
                f"CLIP guidance has {len(source)} sources for a batch of {len(shown)}: give one, or one for each."
            )
        source = resized(source.movedim(-1, 1).to(shown) * 2 - 1, _size(shown))
        total = shown.new_zeros(len(shown))
        masked = self.look.source == "masked"
        if self.weights.background_mse:
            difference = background_mse if masked else reference_background_mse
            total = total + self.weights.background_mse * difference(shown, source, mask)
        if self.weights.background_lpips and self.lpips is not None:
            target = source * (1 - mask) if masked else source
            network = self.lpips.to(shown.device)
            total = total + self.weights.background_lpips * network(shown * (1 - mask), target).reshape(-1)
        return total

    def _mask_for(self, image: Tensor) -> Tensor | None:
        """The mask ``[B or 1, 1, H, W]`` at the size of ``image``."""
        if self.mask is None:
            return None
        if len(self.mask) not in (1, len(image)):
            raise InvalidImage(
                f"CLIP guidance has {len(self.mask)} masks for a batch of {len(image)}: give one, or one for each."
            )
        return resized(self.mask[:, None].to(image), _size(image))


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd may keep, also where the caller is in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[2], image.shape[3]
