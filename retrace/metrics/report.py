"""Edit Report: what an edit changed inside the mask and what it kept outside, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import check_image, check_mask, check_same_size, match_batch
from .perceptual import LpipsNet, load_lpips, lpips_distance
from .quality import PSNR_CAP, changed_pixels, decibel, eight_bit_difference, mse, pool_ssim, ssim_map


@dataclass(frozen=True)
class RegionScores:
    """One region of one image, or means over a batch. None: the region has no pixel, or the metric was not measured."""

    psnr: float | None
    """dB, at most PSNR_CAP"""
    ssim: float | None
    mse: float | None
    lpips: float | None


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


@dataclass(frozen=True)
class EditReport:
    """Scores of a batch. The fields hold the means over the images (``max_difference_outside`` the largest)."""

    overall: RegionScores
    inside: RegionScores
    outside: RegionScores
    max_difference_outside: int | None
    changed_outside: float | None
    mask_area: float
    images: tuple[ImageScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; every number is finite, what does not exist is None."""
        content = asdict(self)
        content["images"] = list(content["images"])
        return {**content, "psnr_cap_db": PSNR_CAP}

    def json(self, indent: int | None = 2) -> str:
        """The report as valid JSON: no NaN or Infinity, null where a value does not exist."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def text(self) -> str:
        """A table for people: regions by metrics, then the background in words, then a line per image of a batch."""
        with_lpips = self.overall.lpips is not None
        lines = [f"{'region':<9}{'PSNR dB':>9}{'SSIM':>9}{'MSE':>11}" + (f"{'LPIPS':>9}" if with_lpips else "")]
        for label, scores in (("overall", self.overall), ("inside", self.inside), ("outside", self.outside)):
            row = (
                f"{label:<9}{_decibel(scores.psnr):>9}{_number(scores.ssim, '.4f'):>9}{_number(scores.mse, '.3e'):>11}"
            )
            lines.append(row + (f"{_number(scores.lpips, '.4f'):>9}" if with_lpips else ""))
        lines.append(f"mask area: {self.mask_area:.1%} of the picture")
        lines.append(f"outside the mask: {_background(self.max_difference_outside, self.changed_outside)}")
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
    lpips: bool | nn.Module = False,
    lpips_net: LpipsNet = "alex",
    lpips_path: str | os.PathLike[str] | None = None,
) -> EditReport:
    """Compare an edit with its source inside and outside the mask.

    Args:
        edited: [B,H,W,3], 0..1, at least 11x11 pixels.
        source: [B,H,W,3] or one [1,H,W,3] for all.
        mask: [B,H,W] or one [1,H,W] for all, 1 = edit; empty and full masks are allowed.
        lpips: measure LPIPS too; a model from :func:`load_lpips` saves loading it again.
        lpips_net, lpips_path: see :func:`load_lpips`.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit.
        MissingPackage, InvalidFile: LPIPS is asked for, and the package or its weights are missing.
    """
    edited, source = check_image("edited image", edited), check_image("source image", source)
    check_same_size("edited image", edited, "the source image", source)
    batch = edited.shape[0]
    source = match_batch(source, batch, "source image").cpu()
    mask = check_mask("mask", mask, size=(edited.shape[1], edited.shape[2]), allow_empty=True)
    mask = match_batch(mask, batch, "mask").cpu()
    edited = edited.cpu()
    model = load_lpips(lpips_net, lpips_path) if lpips is True else lpips or None
    inside = mask > 0
    structure = ssim_map(edited, source)

    def measure(region: Tensor | None) -> list[RegionScores]:
        error = mse(edited, source, region)
        columns = [decibel(error).tolist(), pool_ssim(structure, region).tolist(), error.tolist()]
        columns.append([math.nan] * batch if model is None else _lpips(edited, source, model, region))
        return [RegionScores(*map(_finite_or_none, row)) for row in zip(*columns, strict=True)]

    overall, within, beyond = measure(None), measure(inside), measure(~inside)
    difference = eight_bit_difference(edited, source).masked_fill(inside, 0).amax(dim=(1, 2)).tolist()
    changed = [_finite_or_none(share) for share in changed_pixels(edited, source, ~inside).tolist()]
    area = mask.double().mean(dim=(1, 2)).tolist()
    images = tuple(
        ImageScores(
            overall=overall[i],
            inside=within[i],
            outside=beyond[i],
            max_difference_outside=None if changed[i] is None else difference[i],
            changed_outside=changed[i],
            mask_area=area[i],
        )
        for i in range(batch)
    )
    levels = [image.max_difference_outside for image in images if image.max_difference_outside is not None]
    return EditReport(
        overall=_mean_scores([image.overall for image in images]),
        inside=_mean_scores([image.inside for image in images]),
        outside=_mean_scores([image.outside for image in images]),
        max_difference_outside=max(levels, default=None),
        changed_outside=_mean([image.changed_outside for image in images]),
        mask_area=sum(image.mask_area for image in images) / batch,
        images=images,
    )


def _lpips(edited: Tensor, source: Tensor, model: nn.Module, region: Tensor | None) -> list[float]:
    values = lpips_distance(edited, source, model, region)
    if region is not None:
        values = torch.where(region.any(dim=2).any(dim=1), values, torch.nan)
    return values.tolist()


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
