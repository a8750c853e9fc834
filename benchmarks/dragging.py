"""``python -m benchmarks.dragging``: objects of Pebble's scenes dragged by points; the paper's ablations in miniature.

One object per held-out scene is dragged 16 to 40 pixels by one, two or three points; the mask is the way it goes and 6
pixels around. The scene parser reads where its centre ended. Error: how far that is from where it should be, in shares
of the distance that was asked for. Kept: the object is there once, in its colour and shape. Background: PSNR in dB
against the picture itself outside the mask, without Paste Background; only Warp and Inpaint, which moves the pixels of
the object and paints what that uncovers with Blend Step, keeps the rest with it.

Every row runs in a process of its own, for its peak of memory above the loaded model; the LoRA of a scene is trained
once and serves all rows.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrace.attention.lora.result import IdentityLora
from retrace.attention.lora.settings import LoraTraining
from retrace.attention.lora.train import train
from retrace.attention.reference_kv import ReferenceKV
from retrace.blending.paste import paste_background
from retrace.core.host import Conditioning, LowRank, UNetDenoiser
from retrace.core.sampling import sample_ddim
from retrace.core.schedule import grid_sigmas, truncate
from retrace.drag.latent.edit import drag_points
from retrace.drag.latent.settings import DragSettings
from retrace.drag.latent.task import DragSource
from retrace.drag.points import DragPoints, PointPair
from retrace.drag.warp.apply import WarpSettings, warp_by_points
from retrace.hosts.diffusers import DiffusersHost
from retrace.metrics import psnr
from retrace.models.pebble.scenes import SIZE, Object, Scene, instance_masks, render, sample_scene, scene_rng
from tools.scene_parser import parse

from .applications import APPLICATIONS
from .applications import Recipe as Painting
from .applications import Task as Hole
from .blending import paint
from .results import Section, Table, add_write

SECTION = Section(
    "dragging",
    "Dragging",
    "The object of a held-out scene is dragged 16 to 40 of 128 pixels by one, two or three points. Error: how far "
    "its centre ends from where it should, as a share of the distance. Kept: one object, of its colour and shape. "
    "Background: PSNR outside the mask before *Paste Background* (Warp and Inpaint: after it). Evaluations count the "
    "inversion (`fixed_point`, about three per step) and the sampling of reference and edit, not the LoRA.",
)
FIRST = 700_000  # of the held-out scenes; no other measurement looks at these
STEPS = 50
MARGIN = 6.0
DISTANCE = (16.0, 40.0)  # pixels
KV_LAYER = 3  # the first of the decoder
NEAR = (
    1.0  # stop radius in cells of 2 pixels: Pebble's pictures are a quarter as wide as those the usual 2 is meant for
)


REMOVAL = replace(APPLICATIONS["remove"][1], steps=17, strength=12 / 17)
"""A KSampler of 12 steps at denoise 0.7: it walks the last 12 of the 17 whole steps in 12 / 0.7."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    settings: DragSettings = field(default_factory=lambda: DragSettings(stop_radius=NEAR))
    strength: float = 0.7
    lora: bool = True
    control: bool = True


@dataclass(frozen=True)
class Warping:
    """The row that moves pixels, and how the hole is painted."""

    margin: float = 4.0  # pixels around the object that move with it
    settings: WarpSettings = field(default_factory=lambda: WarpSettings(grow=3))
    painting: Painting = REMOVAL
    lora = False


PAPER = DragSettings(stop_radius=NEAR)
GOOD = DragSettings(mode="gooddrag", stop_radius=NEAR)
ROWS: dict[str, Recipe | Warping] = {
    "GoodDrag": Recipe(GOOD, 0.75),
    "GoodDrag, no LoRA": Recipe(GOOD, 0.75, lora=False),
    "GoodDrag, no reference control": Recipe(GOOD, 0.75, control=False),
    "GoodDrag, hard mask": Recipe(replace(GOOD, hard_mask=True), 0.75),
    "DragDiffusion": Recipe(PAPER),
    "DragDiffusion, no LoRA": Recipe(PAPER, lora=False),
    "DragDiffusion, no reference control": Recipe(PAPER, control=False),
    "DragDiffusion, hard mask": Recipe(replace(PAPER, hard_mask=True)),
    "DragDiffusion, radii of GoodDrag": Recipe(replace(PAPER, patch_radius=4, search_radius=12)),
    "DragDiffusion at step 15 of 50": Recipe(PAPER, 0.3),
    "DragDiffusion at step 50 of 50": Recipe(PAPER, 1.0),
    "DragDiffusion, features of mid.0": Recipe(replace(PAPER, block="mid.0")),
    "DragDiffusion, features of up.1": Recipe(replace(PAPER, block="up.1")),
    "Warp and Inpaint": Warping(),
}


@dataclass(frozen=True)
class Task:
    """A scene, its object where it should end, the points, and where the picture may change (``[1, H, W]``)."""

    scene: Scene
    moved: Object
    points: DragPoints
    mask: Tensor

    @property
    def distance(self) -> float:
        old = self.scene.objects[0]
        return math.hypot(self.moved.x - old.x, self.moved.y - old.y)


@dataclass(frozen=True)
class Score:
    error: float
    kept: bool
    background: float
    evaluations: int
    backwards: int
    seconds: float


def task(index: int, split: str = "heldout") -> Task:
    """Number ``index``: one, two or three points in turn, all moved alike."""
    rng = scene_rng(split, index)
    while True:
        scene = sample_scene(rng, 1)
        thing = scene.objects[0]
        for _ in range(50):
            angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(*DISTANCE)
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            moved = replace(thing, x=thing.x + dx, y=thing.y + dy)
            low, high = moved.reach + 2, SIZE - moved.reach - 2
            if low <= moved.x <= high and low <= moved.y <= high:
                return Task(scene, moved, points(scene, dx, dy, 1 + index % 3, angle), way(scene, moved))


def points(scene: Scene, dx: float, dy: float, count: int, angle: float) -> DragPoints:
    """``count`` points of the object: its centre, or around it at half of its radius."""
    thing = scene.objects[0]
    spread = 0.0 if count == 1 else thing.radius / 2
    pairs = []
    for number in range(count):
        turn = angle + 2 * math.pi * number / count
        x, y = thing.x + spread * math.cos(turn), thing.y + spread * math.sin(turn)
        pairs.append(PointPair((x / SIZE, y / SIZE), ((x + dx) / SIZE, (y + dy) / SIZE)))
    return DragPoints(tuple(pairs), render(scene)[None].movedim(1, -1).contiguous())


def way(scene: Scene, moved: Object) -> Tensor:
    """Everything the object passes over, and a margin."""
    old, stops = scene.objects[0], 16
    places = [
        replace(old, x=old.x + (moved.x - old.x) * i / stops, y=old.y + (moved.y - old.y) * i / stops)
        for i in range(stops + 1)
    ]
    return instance_masks(Scene(scene.ground, tuple(places)), MARGIN).amax(0)[None]


def drag(host: DiffusersHost, job: Task, recipe: Recipe, lora: Mapping[str, LowRank] | None) -> Score:
    """Invert, drag, sample on beside the reference, and read the picture."""
    grid = grid_sigmas("leading_1", host.training_sigmas(), STEPS)
    sigmas = truncate(grid, recipe.strength)
    started = time.perf_counter()

    def work(model: UNetDenoiser, latent: Tensor, conds: Mapping[str, Conditioning]) -> tuple[Tensor, int, int]:
        with model.adapters(lora) if lora is not None else nullcontext():
            source = DragSource(latent, sigmas, conds["words"])
            made = drag_points(model, source, job.points, job.mask, recipe.settings)
            control = ReferenceKV(KV_LAYER)
            with model.attention(control) if recipe.control else nullcontext():
                both = sample_ddim(model, torch.cat([made.reference, made.edited]), made.sigmas, conds["words"])
            return both[1:], model.evaluations, made.backwards

    conds = {"words": host.encode_text(job.scene.caption())}
    latent, evaluations, backwards = host.run(host.encode_image(job.points.picture), conds, work, gradients=True)
    image = host.decode_latent(latent)
    seconds = time.perf_counter() - started
    return Score(*judge(job, image), evaluations, backwards, seconds)


def warp(host: DiffusersHost, job: Task, recipe: Warping) -> Score:
    """Move the pixels of the object, paint what that uncovers, and read the picture."""
    started = time.perf_counter()
    own = instance_masks(job.scene, recipe.margin)
    moved = warp_by_points(job.points, own, recipe.settings)
    picture, words = moved.image[0], Scene(job.scene.ground).caption()
    hole = Hole(picture, picture, moved.inpaint[0], words, "", words, lambda _: True)
    painted, evaluations = paint(host, [hole], recipe.painting, seed=0)
    image = paste_background(painted, moved.image, moved.inpaint, recipe.painting.feather)
    seconds = time.perf_counter() - started
    return Score(*judge(job, image), evaluations, 0, seconds)


def judge(job: Task, image: Tensor) -> tuple[float, bool, float]:
    """Error, whether the object was kept, and the background of ``image`` ``[1, H, W, 3]``."""
    old = job.scene.objects[0]
    seen = parse(image[0].movedim(-1, 0)).objects
    off = min((math.hypot(o.x - job.moved.x, o.y - job.moved.y) for o in seen), default=job.distance)
    kept = [(o.colour, o.shape) for o in seen] == [(old.colour, old.shape)]
    return off / job.distance, kept, float(psnr(image, job.points.picture, job.mask < 0.5)[0])


def learn(host: DiffusersHost, job: Task, training: LoraTraining) -> tuple[dict[str, LowRank], float]:
    """The LoRA of a scene, and how long it took."""
    conds = {"words": host.encode_text(job.scene.caption())}

    def work(model: UNetDenoiser, latent: Tensor, prepared: Mapping[str, Conditioning]) -> IdentityLora:
        return train(model, latent, prepared["words"], host.training_sigmas(), training)

    learned = host.run(host.encode_image(job.points.picture), conds, work, gradients=True)
    return learned.adapters, learned.seconds


def peak_megabytes() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def row(recipe: Recipe | Warping, jobs: list[Task], loras: Path, threads: int) -> tuple[list[Score], float]:
    """All scenes of one row, in a process of its own; and its peak of memory above the loaded model in MB."""
    torch.set_num_threads(threads)
    host = DiffusersHost.load(None)
    loaded = peak_megabytes()
    scores = []
    for number, job in enumerate(jobs):
        kept = loras / f"{number}.pt"
        lora = torch.load(kept, weights_only=False) if recipe.lora and kept.exists() else None
        scores.append(warp(host, job, recipe) if isinstance(recipe, Warping) else drag(host, job, recipe, lora))
    return scores, peak_megabytes() - loaded


def train_all(jobs: list[Task], loras: Path, threads: int, training: LoraTraining) -> float:
    torch.set_num_threads(threads)
    host = DiffusersHost.load(None)
    seconds = []
    for number, job in enumerate(jobs):
        adapters, spent = learn(host, job, training)
        torch.save(adapters, loras / f"{number}.pt")
        seconds.append(spent)
    return float(np.mean(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="names of rows; default: all")
    parser.add_argument("--first", type=int, default=FIRST)
    parser.add_argument("--split", choices=["heldout", "train"], default="heldout")
    parser.add_argument("--lora-steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_write(parser)
    args = parser.parse_args()
    jobs = [task(index, args.split) for index in range(args.first, args.first + args.scenes)]
    conditions = f"{args.scenes} {args.split} scenes from {args.first} on"
    rows = {name: recipe for name, recipe in ROWS.items() if not args.only or name in args.only}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        loras = Path(folder)
        if any(recipe.lora for recipe in rows.values()):
            training = LoraTraining(steps=args.lora_steps, at_once=4)
            seconds = pool.submit(train_all, jobs, loras, args.threads, training).result()
            conditions += f", LoRA of {args.lora_steps} steps in {seconds:.1f} s a scene"
        print(f"{conditions}\n", flush=True)
        table = Table("method", "error", "kept", "background", "evaluations", "backward passes", "seconds", "peak MB")
        for name, recipe in rows.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                scores, peak = alone.submit(row, recipe, jobs, loras, args.threads).result()
            cells = [
                f"{np.mean([s.error for s in scores]):.1%}",
                f"{np.mean([s.kept for s in scores]):.0%}",
                f"{np.mean([s.background for s in scores]):.1f} dB",
                f"{np.mean([s.evaluations for s in scores]):.0f}",
                f"{np.mean([s.backwards for s in scores]):.0f}",
                f"{np.mean([s.seconds for s in scores]):.1f}",
                f"{peak:.0f}",
            ]
            table.add(name, *cells)
    if args.write:
        SECTION.write(table, conditions)


if __name__ == "__main__":
    main()
