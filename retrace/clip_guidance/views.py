"""What the CLIP sees of a picture: the region of the mask, in several random views ("extending augmentations")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import RetraceError, require

View = Literal["region", "picture"]


@dataclass(frozen=True)
class Augmentations:
    """Random views (Avrahami et al. 2022, section 3.3): a gradient that only fools the CLIP fits none but its own.

    ``count`` views in all, the first one as it is; the others are turned by up to ``degrees``, moved by up to the share
    ``translate`` of their side, then seen in perspective, with corners moved by up to half of the share
    ``perspective``. Each of the two happens with ``probability``. The defaults are those of the authors' code (their
    paper has 16 views), but that views move sideways, too: kornia reads that code's single number as up and down only.
    """

    count: int = 8
    degrees: float = 15.0
    translate: float = 0.1
    perspective: float = 0.7
    probability: float = 0.7

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RetraceError(f"augmentations: got {self.count}, but at least 1 view is needed (1 is the plain one).")
        for name in ("translate", "perspective", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise RetraceError(f"{name}: got {getattr(self, name)}, but a share from 0 to 1 is needed.")

    def __call__(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Views ``[count * B, C, h, w]`` of ``pictures`` ``[B, C, h, w]``: all plain ones, then all second ones ...

        Raises:
            MissingPackage: kornia is not installed and more than one view is asked for.
        """
        if self.count == 1:
            return pictures
        kornia = require("kornia.augmentation", "see a picture in several views", "kornia")
        many = pictures.repeat(self.count - 1, 1, 1, 1)
        # kornia draws from the global state of the CPU; this puts it back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for transform in self._transforms(kornia):
                many = transform(many)
        return torch.cat([pictures, many])

    def _transforms(self, kornia: Any) -> list[Any]:
        shift = (self.translate, self.translate)
        return [
            kornia.RandomAffine(self.degrees, shift, p=self.probability, padding_mode="border"),
            kornia.RandomPerspective(self.perspective, p=self.probability),
        ]


def views(
    picture: Tensor,
    mask: Tensor | None,
    size: tuple[int, int],
    augmentations: Augmentations,
    generator: torch.Generator,
    parity: bool = False,
) -> Tensor:
    """Views ``[count * B, 3, h, w]`` in -1..1 of ``size`` of pictures ``[B, 3, H, W]`` with gradients to them.

    Outside ``mask`` ``[B or 1, 1, H, W]`` they are 0, mid-grey. The mask is moved with the picture and applied after
    that, as the paper says; with ``parity`` it is applied first, and pictures shrink by averaging, as in the authors'
    code.
    """
    if parity:
        masked = picture if mask is None else picture * mask
        return augmentations(F.adaptive_avg_pool2d(masked, size), generator)
    if mask is None:
        return augmentations(resized(picture, size), generator)
    together = torch.cat([resized(picture, size), resized(mask, size).expand(len(picture), -1, -1, -1)], dim=1)
    moved = augmentations(together, generator)
    return moved[:, :3] * moved[:, 3:].clamp(0, 1)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """``picture`` ``[B, C, H, W]`` at height and width ``size``, without aliasing; itself where it has them."""
    if tuple(picture.shape[2:]) == size:
        return picture
    return F.interpolate(picture, size, mode="bilinear", antialias=True, align_corners=False)
