"""What the CLIP sees of an image: the region of the mask, in several random views ("extending augmentations")."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidSetting, require

View = Literal["region", "picture"]


@dataclass(frozen=True)
class Augmentations:
    """Random views (Avrahami et al. 2022, section 3.3): a gradient that only fools the CLIP fits none but its own.

    ``count`` views in all, the first one as it is; the others are turned by up to ``degrees``, moved by up to the share
    ``translate`` of their side, then seen in perspective, with corners moved by up to half of the share
    ``perspective``. Each of the two happens with ``probability``. The defaults are those of the authors' code (their
    paper has 16 views), except that views also move sideways: kornia reads that code's single number as up and down
    only.

    Raises:
        InvalidSetting: fewer than 1 view, or a share outside 0..1.
    """

    count: int = 8
    degrees: float = 15.0
    translate: float = 0.1
    perspective: float = 0.7
    probability: float = 0.7

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidSetting(
                f"augmentations: got {self.count}, but at least 1 view is needed (1 is the plain one)."
            )
        for name in ("translate", "perspective", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidSetting(f"{name}: got {getattr(self, name)}, but a share from 0 to 1 is needed.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Views ``[count * B, C, h, w]`` of ``images`` ``[B, C, h, w]``: all plain ones, then all second ones ...

        Raises:
            MissingPackage: kornia is not installed and more than one view is asked for.
        """
        if self.count == 1:
            return images
        kornia = require("kornia.augmentation", "see an image in several views", "kornia")
        many = images.repeat(self.count - 1, 1, 1, 1)
        # kornia draws from the global state of the CPU; this puts it back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for transform in self._transforms(kornia):
                many = transform(many)
        return torch.cat([images, many])

    def _transforms(self, kornia: ModuleType) -> list[nn.Module]:
        shift = (self.translate, self.translate)
        return [
            kornia.RandomAffine(self.degrees, shift, p=self.probability, padding_mode="border"),
            kornia.RandomPerspective(self.perspective, p=self.probability),
        ]


def views(
    image: Tensor,
    mask: Tensor | None,
    size: tuple[int, int],
    augmentations: Augmentations,
    generator: torch.Generator,
) -> Tensor:
    """Views ``[count * B, 3, h, w]`` in -1..1 of ``size`` of images ``[B, 3, H, W]`` with gradients to them.

    Outside ``mask`` ``[B or 1, 1, H, W]`` they are 0, mid-grey. The mask is moved with the image and applied after
    that, as the paper says.
    """
    if mask is None:
        return augmentations(resized(image, size), generator)
    together = torch.cat([resized(image, size), resized(mask, size).expand(len(image), -1, -1, -1)], dim=1)
    moved = augmentations(together, generator)
    return moved[:, :3] * moved[:, 3:].clamp(0, 1)


def reference_views(
    image: Tensor,
    mask: Tensor | None,
    size: tuple[int, int],
    augmentations: Augmentations,
    generator: torch.Generator,
) -> Tensor:
    """:func:`views` as in the authors' code: the mask is applied first, and images shrink by averaging."""
    masked = image if mask is None else image * mask
    return augmentations(F.adaptive_avg_pool2d(masked, size), generator)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``image`` ``[B, C, H, W]`` at height and width ``size``, without aliasing; itself where it has them."""
    if tuple(image.shape[2:]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
