"""The commands ``demo`` and ``edit`` of run.py: files in, an edit, files out."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blending.paste import paste_background
from ..core.errors import InvalidImage, RetraceError, is_out_of_memory
from ..masks import mask_precision
from ..metrics import edit_report
from ..models.pebble import scenes
from ..pictures.contact_sheet import contact_sheet, edit_panels
from ..pictures.files import read_image, read_mask, to_picture, write_whole
from .edit import EditSettings, edit_image
from .terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """What to edit and how: ``image`` ``[1, H, W, 3]``, ``mask`` ``[1, H, W]``, and where the results go."""

    image: Tensor
    mask: Tensor
    source_prompt: str
    prompt: str
    settings: EditSettings
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job, at the size of the image, and its report."""

    reconstruction: Tensor
    edited: Tensor
    report: dict[str, Any]


def main(options: argparse.Namespace) -> int:
    """Run ``demo`` or ``edit``; returns 0, or 2 after one line about what the user can put right."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"):  # nothing is downloaded, so nothing to show
        os.environ.setdefault(name, "1")
    try:
        job = make_job(options)
        finish(job, perform(options, job))
    except RetraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: There was not enough memory for this picture and model. Work at a smaller size (--size 384), or on "
            "the processor (--device cpu).",
            file=sys.stderr,
        )
        return 2
    return 0


def make_job(options: argparse.Namespace) -> Job:
    """The picture, mask and words of the command line, or the example."""
    given = {name: getattr(options, name) for name in ("steps", "guidance", "strength", "seed", "method")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.size is not None and options.size < 64:
        raise InvalidImage(f"--size: got {options.size}, but at least 64 is needed.")
    if options.image is None:
        if any(value is not None for value in (options.mask, options.source, options.prompt)):
            raise RetraceError("--mask, --source and --prompt belong to a picture of your own. Name it: demo photo.png")
        job = example_job(options.output or ROOT / "output" / "demo")
        return replace(job, settings=replace(job.settings, **given))
    for name in ("mask", "source", "prompt"):
        if getattr(options, name) is None:
            raise RetraceError(
                f"For a picture of your own, --{name} is needed too. See: run.py {options.command} --help"
            )
    image = read_image(options.image)
    mask = read_mask(options.mask, (image.shape[1], image.shape[2]))
    name = "demo" if options.command == "demo" else options.image.stem
    output = options.output or ROOT / "output" / name
    return Job(image, mask, options.source, options.prompt, EditSettings(**given), output)


def example_job(output: Path) -> Job:
    """What the example graph "Invert and blend" edits: a held-out scene of Pebble, under its bounding box."""
    (scene,) = scenes.heldout(1, 75, objects=1)
    mask = example_mask(scene)
    image = scenes.render(scene).movedim(0, -1)[None]
    return Job(image, mask, scene.caption(), "a blue square on grass", EditSettings(seed=10), output)


def example_mask(scene: scenes.Scene) -> Tensor:
    """The bounding box of the first object ``[1, 128, 128]``: *Mask Precision Blur* in the example graph."""
    return mask_precision(scenes.instance_masks(scene, margin=3)[:1], level=5, levels=5)


def working_size(height: int, width: int, longest: int, multiple: int) -> tuple[int, int]:
    """The (height, width) to work at: the longer side ``longest``, both sides multiples of ``multiple``."""
    scale = longest / max(height, width)
    high, wide = (max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
    return high, wide


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, 3]`` to ``size`` (height, width), bicubic with antialiasing, 0..1."""
    if tuple(image.shape[1:3]) == size:
        return image
    moved = F.interpolate(image.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
    return moved.clamp(0, 1).movedim(1, -1)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` to ``size``: what a cell touches stays selected where the mask gets smaller."""
    if tuple(mask.shape[1:]) == size:
        return mask
    if size[0] <= mask.shape[1] and size[1] <= mask.shape[2]:
        return F.adaptive_max_pool2d(mask[:, None], size)[:, 0]
    return F.interpolate(mask[:, None], size=size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def _pasted(edited: Tensor, unpasted: Tensor, job: Job, size: tuple[int, int]) -> Tensor:
    """An edit made at ``size`` in the full picture, feathered once: there only the inside of the mask is new."""
    full = (job.image.shape[1], job.image.shape[2])
    if size == full:
        return edited
    feather = job.settings.feather * max(full) / max(size)
    return paste_background(resize(unpasted, full), job.image, job.mask, feather)


def perform(options: argparse.Namespace, job: Job) -> Outcome:
    """Edit ``job`` with a model that diffusers runs.

    A photo is worked on at the model's own size; the edit is brought to the size of the photo and pasted into it.
    """
    from ..hosts.diffusers import DiffusersHost

    terminal = Terminal()
    terminal.say("Loading the model ...")
    host = DiffusersHost.load(options.model, device=_device(options.device), progress=terminal.steps)
    terminal.say(f"Editing with diffusers: {host.name} on {host.device}.")
    if options.device is None and _unused_card(host.device):
        terminal.say(
            "This computer has an NVIDIA card, but the torch in .venv was built without CUDA. To use the card, install "
            "a CUDA wheel there: https://pytorch.org/get-started/locally/"
        )
    full = (job.image.shape[1], job.image.shape[2])
    size = working_size(*full, options.size or host.native_size, host.downscale)
    image, mask = resize(job.image, size), resize_mask(job.mask, size)
    result = edit_image(host, image, mask, job.source_prompt, job.prompt, job.settings, on_stage=terminal.stage)
    report = {
        "model": str(options.model) if options.model else "Pebble",
        "fingerprint": host.fingerprint(),
        "device": str(host.device),
        "working_size": {"width": size[1], "height": size[0]},
        "at_working_size": result.report(),
    }
    edited = _pasted(result.edited, result.unpasted, job, size)
    return Outcome(resize(result.reconstruction, full), edited, report)


def finish(job: Job, outcome: Outcome) -> None:
    """Write pictures, contact sheet and report, and say where."""
    shown = {"reconstruction": outcome.reconstruction, "edit": outcome.edited}
    scores = {name: edit_report(picture, job.image, job.mask) for name, picture in shown.items()}
    pictures = (job.image[0], job.mask[0], outcome.reconstruction[0], outcome.edited[0])
    panels = edit_panels(*pictures, scores, job.source_prompt, job.prompt)
    sheet = contact_sheet(panels, "Retrace")
    report = {
        "source_prompt": job.source_prompt,
        "prompt": job.prompt,
        **outcome.report,
        "scores": {name: report.to_dict() for name, report in scores.items()},
    }
    names = ("source.png", "mask.png", "reconstruction.png", "edit.png")
    files = {}
    for name, picture in (
        *zip(names, map(to_picture, pictures), strict=True),
        ("contact_sheet.png", sheet),
    ):  # all in memory first: a full disk or a bad value leaves no half result
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files[name] = buffer.getvalue()
    files["report.json"] = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False).encode()
    for name, content in files.items():
        write_whole(job.output / name, content)
    print(scores["edit"].text())
    for name in ("contact_sheet.png", "edit.png", "report.json"):
        print(f"{name:<18}{job.output / name}")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RetraceError(
            f"--device: got '{name}', which this machine does not have. Use cuda, mps or cpu."
        ) from error
    return device


def _unused_card(device: torch.device) -> bool:
    return device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi") is not None
