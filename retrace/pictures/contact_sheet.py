"""A labelled sheet of an edit: source, mask, reconstruction, edit and difference, with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from ..metrics import PSNR_CAP, EditReport, ImageScores, RegionScores
from .convert import FAINT, INK, PAPER, to_picture
from .fonts import Font, drawable, font_for

DIFFERENCE_GAIN = 5
_SMALLEST, _LARGEST, _MARGIN = 256, 512, 16


@dataclass(frozen=True)
class Panel:
    """One image ``[H, W, 3]`` or ``[H, W]`` in 0..1 with a title and lines of text under it."""

    title: str
    picture: Tensor
    lines: Sequence[str] = ()


def edit_panels(
    source: Tensor,
    mask: Tensor,
    reconstruction: Tensor,
    edited: Tensor,
    scores: dict[str, EditReport],
    source_prompt: str,
    prompt: str,
) -> list[Panel]:
    """The panels of one edit; images are ``[H, W, 3]``, the mask ``[H, W]``.

    ``scores`` holds the reports named ``reconstruction`` and ``edit``.
    """
    report = scores["edit"].mean
    levels = report.max_difference_outside
    kept = "no outside" if levels is None else "identical" if levels == 0 else f"up to {levels} of 255 levels"
    return [
        Panel("Source", source, [f"“{source_prompt}”"]),
        Panel("Mask", mask, [f"{report.mask_area:.1%} of the image"]),
        Panel("Reconstruction", reconstruction, score_lines(scores["reconstruction"].mean)),
        Panel("Edit", edited, [f"“{prompt}”", *score_lines(report)]),
        Panel(
            f"Difference x{DIFFERENCE_GAIN}",
            ((edited - source).abs() * DIFFERENCE_GAIN).clamp(0, 1),
            ["edit against source", f"outside the mask: {kept}"],
        ),
    ]


def score_lines(scores: ImageScores) -> list[str]:
    """PSNR and SSIM inside and outside the mask, one line each."""
    return [_line("inside", scores.inside), _line("outside", scores.outside)]


def _line(name: str, scores: RegionScores) -> str:
    if scores.psnr is None or scores.ssim is None:
        return f"{name}: empty"
    psnr = "exact" if scores.psnr >= PSNR_CAP else f"{scores.psnr:.1f} dB"
    return f"{name}: PSNR {psnr}, SSIM {scores.ssim:.3f}"


def contact_sheet(panels: Sequence[Panel], heading: str) -> Image.Image:
    """The panels side by side, each with its title above and its lines below."""
    height, width = panels[0].picture.shape[:2]
    longest = max(height, width)
    # Small images are enlarged by whole factors, which keeps their pixels square; large ones are reduced.
    scale = max(1, _SMALLEST // longest) if longest < _LARGEST else _LARGEST / longest
    cell, tall = max(_SMALLEST, round(width * scale)), round(height * scale)
    words = " ".join([heading, *(line for panel in panels for line in panel.lines)])
    title, text = font_for("".join(panel.title for panel in panels), 18), font_for(words, 14)
    texts = [[part for line in panel.lines for part in _wrapped(drawable(line, text), text, cell)] for panel in panels]
    top, step = _MARGIN + 34, 20
    below = top + 28 + tall + 8
    size = (
        _MARGIN + (cell + _MARGIN) * len(panels),
        below + step * max(len(lines) for lines in texts) + _MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), drawable(heading, text), FAINT, text)
    for number, (panel, lines) in enumerate(zip(panels, texts, strict=True)):
        left = _MARGIN + number * (cell + _MARGIN)
        draw.text((left, top), panel.title, INK, title)
        picture = to_picture(panel.picture).convert("RGB")
        enlarge = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((round(width * scale), tall), enlarge), (left, top + 28))
        for row, line in enumerate(lines):
            draw.text((left, below + row * step), line, INK if row == 0 else FAINT, text)
    return sheet


def _wrapped(line: str, font: Font, width: int) -> list[str]:
    """Rows of at most ``width`` pixels, broken at spaces, and inside words that alone are longer (Chinese has none)."""
    rows = [""]
    for word in line.split(" "):
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
            continue
        rows += [""] if rows[-1] else []
        for letter in word:
            if rows[-1] and font.getlength(rows[-1] + letter) > width:
                rows.append("")
            rows[-1] += letter
    return rows
