"""The commands ``demo`` and ``edit`` of run.py: files in, an edit, files out."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contact_sheet import contact_sheet, edit_panels
from .edit import EditSettings, edit_image
from .errors import InvalidImage, RetraceError
from .hosts.comfyui_install import ComfyError, ComfyInstall, find_comfyui
from .masks import mask_precision
from .metrics import EditReport, edit_report
from .paste import paste_background
from .pebble import scenes
from .picture_files import read_image, read_mask, to_picture, write_whole

ROOT = Path(__file__).resolve().parents[1]
FEATHER_SHARE = 0.01  # of the longest side: how far an edit fades into a photo inside the mask


@dataclass(frozen=True)
class Job:
    """What to edit: ``image`` ``[1, H, W, 3]``, ``mask`` ``[1, H, W]``, and where the results go."""

    image: Tensor
    mask: Tensor
    source_prompt: str
    prompt: str
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What a host made of a job, at the size of the picture, and what it reports. ``by`` names the host."""

    by: str
    reconstruction: Tensor
    edited: Tensor
    scores: dict[str, EditReport]
    report: dict[str, Any]


def main(options: argparse.Namespace) -> int:
    """Run ``demo`` or ``edit``; returns 0, or 2 after one line about what the user can put right."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"):  # nothing is downloaded, so nothing to show
        os.environ.setdefault(name, "1")
    try:
        job = _job(options)
        outcome = _through_comfyui(options, job) if options.command == "demo" else None
        finish(job, outcome or through_diffusers(options, job))
    except (RetraceError, ComfyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print(
            "error: There was not enough memory for this picture and model. Work at a smaller size (--size 384), or on "
            "the processor (--device cpu).",
            file=sys.stderr,
        )
        return 2
    return 0


def _job(options: argparse.Namespace) -> Job:
    if options.image is None:
        if any(value is not None for value in (options.mask, options.source, options.prompt)):
            raise RetraceError(
                "--mask, --source and --prompt belong to a picture of your own. Name it too: demo photo.png"
            )
        return example_job(options.output or ROOT / "output" / "demo")
    for name in ("mask", "source", "prompt"):
        if getattr(options, name) is None:
            raise RetraceError(
                f"For a picture of your own, --{name} is needed too. See: run.py {options.command} --help"
            )
    image = read_image(options.image)
    mask = read_mask(options.mask, (image.shape[1], image.shape[2]))
    name = "demo" if options.command == "demo" else options.image.stem
    return Job(image, mask, options.source, options.prompt, options.output or ROOT / "output" / name)


def example_job(output: Path) -> Job:
    """The example: the first held-out Pebble scene that is just a red circle shall become a blue square."""
    scene = next(
        s for s in scenes.heldout(500, objects=1) if (s.objects[0].colour, s.objects[0].shape) == ("red", "circle")
    )
    wanted = replace(scene, objects=(replace(scene.objects[0], colour="blue", shape="square"),))
    mask = mask_precision(scenes.instance_masks(scene), 5)
    return Job(scenes.render(scene).movedim(0, -1)[None], mask, scene.caption(), wanted.caption(), output)


def working_size(height: int, width: int, longest: int, multiple: int) -> tuple[int, int]:
    """The (height, width) to work at: the longer side ``longest``, both sides multiples of ``multiple``."""
    scale = longest / max(height, width)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))  # type: ignore[return-value]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, 3]`` to ``size`` (height, width), bicubic with antialiasing, 0..1."""
    if tuple(image.shape[1:3]) == size:
        return image
    moved = F.interpolate(image.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
    return moved.clamp(0, 1).movedim(1, -1)


def through_diffusers(options: argparse.Namespace, job: Job) -> Outcome:
    """Edit ``job`` with a model that diffusers runs.

    A photo is worked on at the model's own size; the edit is brought to the size of the photo and pasted into it.
    """
    settings = EditSettings(
        steps=options.steps, guidance=options.guidance, strength=options.strength, seed=options.seed
    )
    from .hosts.diffusers import DiffusersHost

    if options.size is not None and options.size < 64:
        raise InvalidImage(f"--size: got {options.size}, but at least 64 is needed.")
    print("Loading the model ...", flush=True)
    host = DiffusersHost.load(options.model, device=_device(options.device), progress=_show_steps)
    print(f"Editing with diffusers: {host.name} on {host.device}.", flush=True)
    full = (job.image.shape[1], job.image.shape[2])
    size = working_size(*full, options.size or host.native_size, host.downscale)
    mask = F.interpolate(job.mask[:, None], size=size, mode="area")[:, 0] if size != full else job.mask
    result = edit_image(
        host, resize(job.image, size), mask, job.source_prompt, job.prompt, settings, on_stage=_show_stage
    )
    feather = math.ceil(FEATHER_SHARE * max(full)) if size != full else 0
    edited = paste_background(resize(result.edited, full), job.image, job.mask, feather)
    report = {
        "model": str(options.model) if options.model else "Pebble",
        "fingerprint": host.fingerprint(),
        "device": str(host.device),
        "working_size": {"width": size[1], "height": size[0]},
        **result.report(),
    }
    scores = {**result.scores(), "edit": edit_report(edited, job.image, job.mask)}
    return Outcome("diffusers", resize(result.reconstruction, full), edited, scores, report)


def _through_comfyui(options: argparse.Namespace, job: Job) -> Outcome | None:
    """The same edit in a ComfyUI, or None when diffusers shall do it; says why."""
    if options.host == "diffusers":
        return None
    install: ComfyInstall | None = find_comfyui()
    if options.model is not None and options.host == "auto":
        print("A model file was given, so diffusers runs it.", flush=True)
        return None
    if install is None:
        if options.host == "comfyui":
            raise ComfyError("No ComfyUI was found. Set COMFYUI_PATH to the folder that holds its main.py.")
        print("No ComfyUI was found (COMFYUI_PATH, custom_nodes, ~/ComfyUI), so diffusers makes the edit.", flush=True)
        return None
    from .demo_graph import run_in_comfyui

    try:
        return run_in_comfyui(install, options, job)
    except ComfyError as error:
        if options.host == "comfyui":
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"The ComfyUI in {install.path} could not run the example graph: {reason}", flush=True)
        print("So diffusers makes the edit. (--host comfyui stops here instead.)", flush=True)
        return None


def finish(job: Job, outcome: Outcome) -> None:
    """Write pictures, contact sheet and report, and say where."""
    panels = edit_panels(
        job.image[0],
        job.mask[0],
        outcome.reconstruction[0],
        outcome.edited[0],
        outcome.scores,
        job.source_prompt,
        job.prompt,
    )
    sheet = contact_sheet(panels, f"Retrace, through {outcome.by}")
    report = {
        "host": outcome.by,
        "source_prompt": job.source_prompt,
        "prompt": job.prompt,
        **outcome.report,
        "scores": {name: scores.to_dict() for name, scores in outcome.scores.items()},
    }
    pictures = {
        "source.png": to_picture(job.image[0]),
        "mask.png": to_picture(job.mask[0]),
        "reconstruction.png": to_picture(outcome.reconstruction[0]),
        "edit.png": to_picture(outcome.edited[0]),
        "contact_sheet.png": sheet,
    }
    files = {}
    for name, picture in pictures.items():  # all in memory first: a full disk or a bad value leaves no half result
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files[name] = buffer.getvalue()
    files["report.json"] = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False).encode()
    for name, content in files.items():
        write_whole(job.output / name, content)
    print(outcome.scores["edit"].text())
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


_NAMES = {"invert": "Inverting", "reconstruct": "Reconstructing", "edit": "Editing"}
_stage: dict[str, Any] = {"name": "", "begun": 0.0}


def _show_stage(name: str) -> None:
    _stage.update(name=_NAMES.get(name, name), begun=time.perf_counter())


def _show_steps(step: int, total: int, _: Tensor | None) -> None:
    """One line that is rewritten on a terminal; elsewhere only the end of a stage is printed."""
    line = f"  {_stage['name']:<15}{step:>4} of {total}   {time.perf_counter() - _stage['begun']:5.1f} s"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if step == total else "", flush=True)
    elif step == total:
        print(line, flush=True)
