"""``python -m benchmarks.edit_cost``: how often the library checks its input during one edit, and how long that takes.

Two edits with Pebble: ``run.py edit`` on an image of 1200x800 (all of it, with loading the model and writing the
files), and Blend Step + KSampler inside a ComfyUI (``COMFYUI_PATH`` or ``~/ComfyUI``; left out where there is none).
Every call of a check of the library counts, whoever makes it. One thread, so that a busy machine distorts little.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .results import Section, Table, add_write

CHECKS = "retrace.core.checks"  # the module of the checks; what starts with `check_`, and `match_batch`
COMMAND = "retrace.cli.main"  # the module whose `main` is `run.py edit`

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, STEPS = 1200, 800, 50
SECTION = Section(
    "edit_cost",
    "What an edit costs beside the model",
    "Calls of the library's checks during one edit with Pebble, by function, and the seconds of `run.py edit` on an "
    "image of 1200x800, with loading the model and writing the files.",
)


@contextmanager
def counted(package: str = "") -> Iterator[Counter[str]]:
    """Count the calls of all checks while the block runs; ``package`` is the name that the pack was imported under."""
    checks = importlib.import_module(package + CHECKS)
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*args, **named)

        return call

    replaced: list[tuple[ModuleType, str, object]] = []
    try:
        for name, function in list(vars(checks).items()):
            if not isinstance(function, FunctionType) or not (name.startswith("check_") or name == "match_batch"):
                continue
            wrapper = counting(name, function)
            for module in list(sys.modules.values()):  # those that imported it, too
                for own, value in list(getattr(module, "__dict__", {}).items()):
                    if value is function:
                        replaced.append((module, own, value))
                        setattr(module, own, wrapper)
        yield calls
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def photograph(folder: Path) -> tuple[Path, Path]:
    """An image with detail at every scale, and a mask, as files."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng, image = np.random.default_rng(0), np.zeros((HEIGHT, WIDTH, 3))
    for cells in (3, 12, 50, 200):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=float) / 4
    mask = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).ellipse((400, 200, 800, 600), fill=255)
    files = folder / "photo.png", folder / "mask.png"
    Image.fromarray(image.astype(np.uint8)).save(files[0])
    mask.save(files[1])
    return files


def run_edit(folder: Path) -> tuple[Counter[str], float, float]:
    """``run.py edit`` in this process: calls, seconds, and seconds of all processors."""
    import run

    image, mask = photograph(folder)
    words = ["--source", "a red circle on sand", "--prompt", "a blue square on sand", "--steps", str(STEPS)]
    options = ["edit", str(image), "--mask", str(mask), *words, "--output", str(folder / "out")]
    command = importlib.import_module(COMMAND)
    with counted() as calls:
        wall, processor = time.perf_counter(), time.process_time()
        if command.main(run.arguments().parse_args(options)) != 0:
            raise SystemExit("run.py edit failed; its message is above")
        return calls, time.perf_counter() - wall, time.process_time() - processor


def blend_inside() -> Counter[str] | None:
    """Blend Step + KSampler in a process of the ComfyUI's Python; None where there is no ComfyUI."""
    from tools.comfyui.install import find_comfyui

    install = find_comfyui()
    if install is None:
        return None
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.edit_cost import blend; blend()"
    done = subprocess.run([str(install.python), "-c", code], cwd=install.path, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"Blend Step failed in {install.path}:\n{done.stderr[-3000:]}")
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def blend() -> None:
    """What :func:`blend_inside` runs: the nodes as the executor calls them, with the pack imported as ComfyUI does."""
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, os.getcwd())
    import comfy.options

    comfy.options.enable_args_parsing()
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    core = importlib.import_module("nodes")
    own = importlib.import_module("pack.nodes")
    node = {kind.define_schema().node_id: kind for kind in own.NODES}
    with torch.inference_mode():
        model, clip, vae = node["RetraceLoadPebble"].execute().args
        image = torch.full((1, 128, 128, 3), 0.5)
        mask = torch.zeros(1, 128, 128)
        mask[:, 32:96, 32:96] = 1
        (latent,) = core.VAEEncode().encode(vae, image)
        positive, negative = (core.CLIPTextEncode().encode(clip, text)[0] for text in ("a blue square on sand", ""))
        with counted("pack.") as calls:
            choices = {"noise": "fresh", "level": "next", "cells": "area", "shrink_stages": 0, "seed": 0}
            blended = node["RetraceBlendStep"].execute(model=model, mask=mask, source=latent, **choices).args[0]
            core.common_ksampler(blended, 0, 20, 5.0, "euler_ancestral", "normal", positive, negative, latent)
    print(json.dumps(calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    add_write(parser)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        calls, seconds, processor = run_edit(Path(folder))
    counts = {"run.py edit": calls}
    inside = blend_inside()
    if inside is not None:
        counts["Blend Step + KSampler"] = inside
    print()
    table = Table("edit", "calls", "by function", "seconds", "processor seconds")
    for name, found in counts.items():
        parts = ", ".join(f"`{check}` {count}" for check, count in found.most_common())
        times = (f"{seconds:.1f}", f"{processor:.1f}") if name == "run.py edit" else ("", "")
        table.add(name, str(found.total()), parts, *times)
    if args.write:
        SECTION.write(table, f"{WIDTH}x{HEIGHT}, {STEPS} steps")


if __name__ == "__main__":
    main()
