"""Edit Report: what an edit changed inside the mask and what it kept outside, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_image, check_mask, check_same_size, match_batch
from ..core.errors import RetraceError
from ..models.clip.model import ImageTextModel
from .clip_score import ClipScores, clip_scores
from .perceptual import LpipsNet, load_lpips, lpips_distance
from .quality import PSNR_CAP, changed_pixels, decibel, eight_bit_difference, mse, pool_ssim, ssim_map
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
    """cosine of picture and prompt; see :class:`ClipScores` for what it sees of a region"""


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
    """of the whole pictures, 0 for the same layout"""


@dataclass(frozen=True)
class EditReport:
    """Scores of a batch. The fields hold the means over the images (``max_difference_outside`` the largest)."""

    overall: RegionScores
    inside: RegionScores
    outside: RegionScores
    max_difference_outside: int | None
    changed_outside: float | None
    mask_area: float
    clip_box: float | None
    structure_distance: float | None
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
        extra = [name for name in ("lpips", "clip") if getattr(self.overall, name) is not None]
        head = f"{'region':<9}{'PSNR dB':>9}{'SSIM':>9}{'MSE':>11}"
        lines = [head + "".join(f"{name.upper():>9}" for name in extra)]
        for label, scores in (("overall", self.overall), ("inside", self.inside), ("outside", self.outside)):
            row = (
                f"{label:<9}{_decibel(scores.psnr):>9}{_number(scores.ssim, '.4f'):>9}{_number(scores.mse, '.3e'):>11}"
            )
            lines.append(row + "".join(f"{_number(getattr(scores, name), '.4f'):>9}" for name in extra))
        lines.append(f"mask area: {self.mask_area:.1%} of the picture")
        lines.append(f"outside the mask: {_background(self.max_difference_outside, self.changed_outside)}")
        if self.clip_box is not None:
            lines.append(f"CLIP score of the box around the mask: {self.clip_box:.4f}")
        if self.structure_distance is not None:
            lines.append(f"structure distance: {self.structure_distance:.3e}")
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
    clip: ImageTextModel | None = None,
    prompt: str = "",
    tokens: Callable[[Tensor], Tensor] | None = None,
) -> EditReport:
    """Compare an edit with its source inside and outside the mask.

    Args:
        edited: [B,H,W,3], 0..1, at least 11x11 pixels.
        source: [B,H,W,3] or one [1,H,W,3] for all.
        mask: [B,H,W] or one [1,H,W] for all, 1 = edit; empty and full masks are allowed.
        lpips: measure LPIPS too; a model from :func:`load_lpips` saves loading it again.
        lpips_net, lpips_path: see :func:`load_lpips`.
        clip, prompt: measure CLIP scores of these words; without words there are none.
        tokens: measure the structure distance of what this gives: images [1,H,W,3] to spatial tokens [1,N,C], for
            example ``clip.visual_tokens``.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit.
        RetraceError: there is a prompt without a model.
        MissingPackage, InvalidFile: LPIPS is asked for, and the package or its weights are missing.
    """
    prompt = prompt.strip()
    if prompt and clip is None:
        raise RetraceError(
            "prompt: got words to score, but no CLIP. Connect 'Load CLIP (Retrace)', or empty the prompt."
        )
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
    absent = torch.full((batch,), torch.nan)
    words = ClipScores(absent, absent, absent, absent)
    if clip is not None and prompt:
        words = clip_scores(edited, prompt, clip, inside)

    def measure(region: Tensor | None, clip_column: Tensor) -> list[RegionScores]:
        error = mse(edited, source, region)
        columns = [decibel(error).tolist(), pool_ssim(structure, region).tolist(), error.tolist()]
        columns.append([math.nan] * batch if model is None else _lpips(edited, source, model, region))
        columns.append(clip_column.tolist())
        return [RegionScores(*map(_finite_or_none, row)) for row in zip(*columns, strict=True)]

    overall = measure(None, words.whole)
    within, beyond = measure(inside, words.inside), measure(~inside, words.outside)
    box = [_finite_or_none(score) for score in words.box.tolist()]
    layout = absent if tokens is None else _structure(edited, source, tokens)
    layouts = [_finite_or_none(distance) for distance in layout.tolist()]
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
            clip_box=box[i],
            structure_distance=layouts[i],
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
        clip_box=_mean(box),
        structure_distance=_mean(layouts),
        images=images,
    )


def _lpips(edited: Tensor, source: Tensor, model: nn.Module, region: Tensor | None) -> list[float]:
    values = lpips_distance(edited, source, model, region)
    if region is not None:
        values = torch.where(region.any(dim=2).any(dim=1), values, torch.nan)
    return values.tolist()


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
