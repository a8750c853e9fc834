"""Edit Report: what an edit changed inside the mask and what it kept outside, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_image, check_mask, check_same_size, match_batch
from ..core.errors import InvalidInput, Remedy
from ..models.clip.model import ImageTextModel
from .clip_score import ClipScores, trusted_clip_scores
from .perceptual import trusted_lpips
from .quality import PSNR_CAP, Comparison, decibel, mean_over, pool_ssim
from .structure import structure_distance


@dataclass(frozen=True)
class RegionScores:
    """One region of one image, or means over a batch. None: the region has no pixel, or the metric was not measured."""

    psnr: float | None
    """dB, at most PSNR_CAP"""
    ssim: float | None
    mse: float | None
    lpips: float | None
    clip: float | None
    """cosine of image and prompt; see :class:`ClipScores` for what it sees of a region"""


@dataclass(frozen=True)
class ImageScores:
    """One edited image against its source. Inside is every pixel with mask > 0, outside every other."""

    overall: RegionScores
    inside: RegionScores
    outside: RegionScores
    max_difference_outside: int | None
    """largest difference outside the mask in 8-bit levels 0..255; None without an outside"""
    changed_outside: float | None
    """share 0..1 of the outside pixels whose 8-bit value changed; None without an outside"""
    mask_area: float
    """mean of the mask, 0..1: a soft mask counts with its values"""
    clip_box: float | None
    """CLIP score of the box around the mask, cut out"""
    structure_distance: float | None
    """of the whole images, 0 for the same layout"""


@dataclass(frozen=True)
class EditReport:
    """Scores of a batch: of each image, and their means (``max_difference_outside`` is the largest)."""

    mean: ImageScores
    images: tuple[ImageScores, ...]

    @classmethod
    def of(cls, images: Sequence[ImageScores]) -> EditReport:
        """The report of these images, at least one."""
        levels = [image.max_difference_outside for image in images if image.max_difference_outside is not None]
        mean = ImageScores(
            overall=_mean_scores([image.overall for image in images]),
            inside=_mean_scores([image.inside for image in images]),
            outside=_mean_scores([image.outside for image in images]),
            max_difference_outside=max(levels, default=None),
            changed_outside=_mean([image.changed_outside for image in images]),
            mask_area=sum(image.mask_area for image in images) / len(images),
            clip_box=_mean([image.clip_box for image in images]),
            structure_distance=_mean([image.structure_distance for image in images]),
        )
        return cls(mean, tuple(images))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; every number is finite, what does not exist is None."""
        return {
            **asdict(self.mean),
            "images": [asdict(image) for image in self.images],
            "psnr_cap_db": PSNR_CAP,
        }

    def json(self, indent: int | None = 2) -> str:
        """The report as valid JSON: no NaN or Infinity, null where a value does not exist."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def text(self) -> str:
        """A table for people: regions by metrics, then the background in words, then a line per image of a batch."""
        mean = self.mean
        extra = [name for name in ("lpips", "clip") if getattr(mean.overall, name) is not None]
        head = f"{'region':<9}{'PSNR dB':>9}{'SSIM':>9}{'MSE':>11}"
        lines = [head + "".join(f"{name.upper():>9}" for name in extra)]
        for label, scores in (("overall", mean.overall), ("inside", mean.inside), ("outside", mean.outside)):
            row = (
                f"{label:<9}{_decibel(scores.psnr):>9}{_number(scores.ssim, '.4f'):>9}{_number(scores.mse, '.3e'):>11}"
            )
            lines.append(row + "".join(f"{_number(getattr(scores, name), '.4f'):>9}" for name in extra))
        lines.append(f"mask area: {mean.mask_area:.1%} of the image")
        lines.append(f"outside the mask: {_background(mean.max_difference_outside, mean.changed_outside)}")
        if mean.clip_box is not None:
            lines.append(f"CLIP score of the box around the mask: {mean.clip_box:.4f}")
        if mean.structure_distance is not None:
            lines.append(f"structure distance: {mean.structure_distance:.3e}")
        if len(self.images) > 1:
            lines.append(f"means over {len(self.images)} images (the largest 8-bit difference); each one:")
            for number, image in enumerate(self.images, start=1):
                lines.append(
                    f"{number:>3}: inside {_decibel(image.inside.psnr)} dB, outside {_decibel(image.outside.psnr)} dB, "
                    f"{_background(image.max_difference_outside, image.changed_outside)}"
                )
        return "\n".join(lines)


def edit_report(
    edited: Tensor,
    source: Tensor,
    mask: Tensor,
    *,
    lpips: nn.Module | None = None,
    clip: ImageTextModel | None = None,
    prompt: str = "",
    tokens: Callable[[Tensor], Tensor] | None = None,
) -> EditReport:
    """Compare an edit with its source inside and outside the mask.

    Args:
        edited: ``[B, H, W, 3]``, 0..1, at least 11x11 pixels.
        source: ``[B, H, W, 3]`` or one ``[1, H, W, 3]`` for all.
        mask: ``[B, H, W]`` or one ``[1, H, W]`` for all, 1 = edit; empty and full masks are allowed.
        lpips: measure LPIPS with this model, from :func:`load_lpips`.
        clip, prompt: measure CLIP scores of these words; without words there are none.
        tokens: measure the structure distance of what this gives: images ``[1, H, W, 3]`` to spatial tokens
            ``[1, N, C]``, for example ``clip.visual_tokens``.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit.
        InvalidInput: there is a prompt without a model.
        MissingPackage: kornia is not installed.
    """
    prompt = prompt.strip()
    if prompt and clip is None:
        raise InvalidInput("prompt: got words to score, but no CLIP.", Remedy.CONNECT_CLIP)
    edited, source = check_image("edited image", edited), check_image("source image", source)
    check_same_size("edited image", edited, "the source image", source)
    mask = check_mask("mask", mask, size=(edited.shape[1], edited.shape[2]), allow_empty=True)
    batch = edited.shape[0]
    source, mask = match_batch(source, batch, "source image").cpu(), match_batch(mask, batch, "mask").cpu()
    measured = _Measured(edited.cpu(), source, mask, lpips)
    absent = torch.full((batch,), torch.nan)
    words = ClipScores(absent, absent, absent, absent)
    if clip is not None and prompt:
        words = trusted_clip_scores(measured.edited, prompt, clip, measured.inside)
    layout = absent if tokens is None else _structure(measured.edited, source, tokens)
    return EditReport.of(measured.scores(words, layout))


class _Measured:
    """A checked batch on the CPU, and what its pixels say about it."""

    def __init__(self, edited: Tensor, source: Tensor, mask: Tensor, lpips: nn.Module | None) -> None:
        self.edited, self.source, self.mask, self.lpips = edited, source, mask, lpips
        self.inside = mask > 0
        self.pair = Comparison.trusted(edited, source)

    def scores(self, words: ClipScores, layout: Tensor) -> list[ImageScores]:
        """Those of each image; ``words`` and ``layout`` hold NaN where something was not measured."""
        levels = self.pair.levels
        rows = zip(
            self._of_region(None, words.whole),
            self._of_region(self.inside, words.inside),
            self._of_region(~self.inside, words.outside),
            levels.masked_fill(self.inside, 0).amax(dim=(1, 2)).tolist(),
            map(_finite_or_none, mean_over((levels > 0).double(), ~self.inside).tolist()),
            self.mask.double().mean(dim=(1, 2)).tolist(),
            map(_finite_or_none, words.box.tolist()),
            map(_finite_or_none, layout.tolist()),
            strict=True,
        )
        return [
            ImageScores(overall, inside, outside, None if changed is None else most, changed, area, box, distance)
            for overall, inside, outside, most, changed, area, box, distance in rows
        ]

    def _of_region(self, region: Tensor | None, clip: Tensor) -> list[RegionScores]:
        error = mean_over(self.pair.squared_error, region)
        structure = pool_ssim(self.pair.ssim, region)
        columns = (decibel(error), structure, error, self._lpips(region), clip)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [RegionScores(*map(_finite_or_none, row)) for row in rows]

    def _lpips(self, region: Tensor | None) -> Tensor:
        if self.lpips is None:
            return torch.full((len(self.edited),), torch.nan)
        values = trusted_lpips(self.edited, self.source, self.lpips, region)
        # Nothing outside a region without pixels counts, so its distance of 0 says nothing.
        return values if region is None else values.where(region.flatten(1).any(dim=1), torch.nan)


def _structure(edited: Tensor, source: Tensor, tokens: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        pairs = zip(edited.split(1), source.split(1), strict=True)
        return torch.cat([structure_distance(tokens(one), tokens(other)) for one, other in pairs])


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _mean_scores(rows: Sequence[RegionScores]) -> RegionScores:
    return RegionScores(*(_mean([getattr(row, name) for row in rows]) for name in RegionScores.__dataclass_fields__))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _decibel(value: float | None) -> str:
    return f">={PSNR_CAP:.0f}" if value is not None and value >= PSNR_CAP else _number(value, ".2f")


def _background(level: int | None, changed: float | None) -> str:
    if level is None or changed is None:
        return "there is none (the mask covers everything)"
    if level == 0:
        return "identical in 8 bits"
    return f"{changed:.2%} of the pixels changed, by at most {level} of 255"
