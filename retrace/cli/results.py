"""What an edit leaves behind: its images, a contact sheet, a report, and what is said about them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..metrics import EditReport, edit_report
from ..pictures.contact_sheet import contact_sheet, edit_panels
from ..pictures.convert import to_picture
from ..pictures.files import write_whole
from .edit import EditPrompts


@dataclass(frozen=True)
class Outcome:
    """Images ``[1, H, W, 3]`` and the mask ``[1, H, W]``, all of one size, and what else the report says."""

    source: Tensor
    mask: Tensor
    reconstruction: Tensor
    edited: Tensor
    facts: dict[str, object]

    def scores(self) -> dict[str, EditReport]:
        """The reports named ``reconstruction`` and ``edit``."""
        images = {"reconstruction": self.reconstruction, "edit": self.edited}
        return {name: edit_report(image, self.source, self.mask) for name, image in images.items()}


def save(outcome: Outcome, prompts: EditPrompts, folder: Path) -> str:
    """Write everything into ``folder``; returns what to tell the user.

    Raises:
        InvalidFile: the folder cannot be made or written to.
    """
    scores = outcome.scores()
    # All in memory first: a full disk or a bad value leaves no half result.
    files = {**_images(outcome, prompts, scores), "report.json": _report(outcome, prompts, scores)}
    for name, content in files.items():
        write_whole(folder / name, content)
    shown = ("contact_sheet.png", "edit.png", "report.json")
    return "\n".join([scores["edit"].text(), *(f"{name:<18}{folder / name}" for name in shown)])


def _images(outcome: Outcome, prompts: EditPrompts, scores: dict[str, EditReport]) -> dict[str, bytes]:
    source, mask = outcome.source[0], outcome.mask[0]
    reconstruction, edited = outcome.reconstruction[0], outcome.edited[0]
    panels = edit_panels(source, mask, reconstruction, edited, scores, str(prompts.source), str(prompts.target))
    return {
        "source.png": _png(to_picture(source)),
        "mask.png": _png(to_picture(mask)),
        "reconstruction.png": _png(to_picture(reconstruction)),
        "edit.png": _png(to_picture(edited)),
        "contact_sheet.png": _png(contact_sheet(panels, "Retrace")),
    }


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _report(outcome: Outcome, prompts: EditPrompts, scores: dict[str, EditReport]) -> bytes:
    content = {
        "source_prompt": prompts.source,
        "prompt": prompts.target,
        **outcome.facts,
        "scores": {name: report.to_dict() for name, report in scores.items()},
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False).encode()
