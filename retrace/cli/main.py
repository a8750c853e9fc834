"""The commands ``demo`` and ``edit`` of run.py: files in, an edit, files out."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blending.paste import paste_background
from ..core.errors import InvalidInput, InvalidSetting, RetraceError, is_out_of_memory
from ..core.images import resize
from ..hosts.diffusers import DiffusersHost
from ..masks import mask_precision
from ..models.pebble import scenes
from ..pictures.files import read_image, read_mask
from .edit import EditPrompts, EditResult, EditSettings, edit_image
from .results import Outcome, save
from .terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = 64  # pixels of --size: a few cells of a latent


@dataclass(frozen=True)
class Job:
    """What to edit and how: ``image`` ``[1, H, W, 3]``, ``mask`` ``[1, H, W]``, and where the results go."""

    image: Tensor
    mask: Tensor
    prompts: EditPrompts
    settings: EditSettings
    output: Path

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.image.shape[1], self.image.shape[2]


def main(options: argparse.Namespace) -> int:
    """Run ``demo`` or ``edit``; returns 0, or 2 after one line about what the user can put right."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"):  # nothing is downloaded, so nothing to show
        os.environ.setdefault(name, "1")
    try:
        job = make_job(options)
        print(save(perform(options, job), job.prompts, job.output))
    except RetraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: There was not enough memory for this image and model. Work at a smaller size (--size 384), or on "
            "the processor (--device cpu).",
            file=sys.stderr,
        )
        return 2
    return 0


def make_job(options: argparse.Namespace) -> Job:
    """The image, mask and words of the command line, or the example."""
    if options.size is not None and options.size < SMALLEST:
        raise InvalidSetting(f"--size: got {options.size}, but at least {SMALLEST} is needed.")
    given = {name: getattr(options, name) for name in ("steps", "guidance", "strength", "seed", "method")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.image is not None:
        return _own_job(options, EditSettings(**given))
    if any(value is not None for value in (options.mask, options.source, options.prompt)):
        raise InvalidInput("--mask, --source and --prompt go with an image of your own. Name it: demo photo.png")
    job = example_job(options.output or ROOT / "output" / "demo")
    return replace(job, settings=replace(job.settings, **given))


def _own_job(options: argparse.Namespace, settings: EditSettings) -> Job:
    for name in ("mask", "source", "prompt"):
        if getattr(options, name) is None:
            raise InvalidInput(f"An image of your own needs --{name}. See: run.py {options.command} --help")
    image = read_image(options.image)
    mask = read_mask(options.mask, (image.shape[1], image.shape[2]))
    name = "demo" if options.command == "demo" else options.image.stem
    prompts = EditPrompts(options.source, options.prompt)
    return Job(image, mask, prompts, settings, options.output or ROOT / "output" / name)


def example_job(output: Path) -> Job:
    """What the example graph "Invert and blend" edits: a held-out scene of Pebble, under its bounding box."""
    (scene,) = scenes.heldout(1, 75, objects=1)
    image = scenes.render(scene).movedim(0, -1)[None]
    prompts = EditPrompts(scene.caption(), "a blue square on grass")
    return Job(image, example_mask(scene), prompts, EditSettings(seed=10), output)


def example_mask(scene: scenes.Scene) -> Tensor:
    """The bounding box of the first object ``[1, 128, 128]``: *Mask Precision Blur* in the example graph."""
    return mask_precision(scenes.instance_masks(scene, margin=3)[:1], level=5, levels=5)


def perform(options: argparse.Namespace, job: Job) -> Outcome:
    """Edit ``job`` with a model that diffusers runs.

    A photo is worked on at the model's own size; the edit is brought to the size of the photo and pasted into it.
    """
    terminal = Terminal()
    host = _load(options, terminal)
    size = working_size(*job.size, options.size or host.native_size, host.downscale)
    image, mask = resize(job.image, size), resize_mask(job.mask, size)
    result = edit_image(host, image, mask, job.prompts, job.settings, on_stage=terminal.stage)
    return Outcome(
        source=job.image,
        mask=job.mask,
        reconstruction=resize(result.reconstruction, job.size),
        edited=pasted(result.painted, job),
        facts=_facts(options, host, result),
    )


def _load(options: argparse.Namespace, terminal: Terminal) -> DiffusersHost:
    terminal.say("Loading the model ...")
    host = DiffusersHost.load(options.model, device=_device(options.device), progress=terminal.steps)
    terminal.say(f"Editing with diffusers: {host.name} on {host.device}.")
    if options.device is None and _unused_card(host.device):
        terminal.say(
            "This computer has an NVIDIA card, but the torch in .venv was built without CUDA. To use the card, install "
            "a CUDA wheel there: https://pytorch.org/get-started/locally/"
        )
    return host


def _facts(options: argparse.Namespace, host: DiffusersHost, result: EditResult) -> dict[str, object]:
    height, width = result.source.shape[1:3]
    return {
        "model": str(options.model) if options.model else "Pebble",
        "fingerprint": host.fingerprint(),
        "device": str(host.device),
        "working_size": {"width": width, "height": height},
        "at_working_size": result.report(),
    }


def pasted(painted: Tensor, job: Job) -> Tensor:
    """An edit of any size in the full image, feathered once: only the inside of the mask is new there."""
    feather = job.settings.feather * max(job.size) / max(painted.shape[1:3])
    return paste_background(resize(painted, job.size), job.image, job.mask, feather)


def working_size(height: int, width: int, longest: int, multiple: int) -> tuple[int, int]:
    """The (height, width) to work at: the longer side ``longest``, both sides multiples of ``multiple``."""
    scale = longest / max(height, width)
    high, wide = (max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
    return high, wide


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` to ``size``: what a cell touches stays selected where the mask gets smaller."""
    if tuple(mask.shape[1:]) == size:
        return mask
    if size[0] <= mask.shape[1] and size[1] <= mask.shape[2]:
        return F.adaptive_max_pool2d(mask[:, None], size)[:, 0]
    return F.interpolate(mask[:, None], size=size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidSetting(
            f"--device: got '{name}', which this machine does not have. Use cuda, mps or cpu."
        ) from error
    return device


def _unused_card(device: torch.device) -> bool:
    return device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi") is not None
