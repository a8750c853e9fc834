"""``python -m benchmarks.blending``: what blending is used for, on Pebble, judged by the scene parser.

For each application of :mod:`benchmarks.applications`: how often a single sample succeeds, how often the one of several
that Rank by CLIP puts first, how often any of them does, whether the image outside of the mask is the same in 8 bits,
and what a sample costs. Settings are found on training scenes (``--split train``); held-out scenes are looked at once.

``--only seam`` measures how steep the border of the mask is after a paste, against the same border in the source.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, cast, get_args

import torch
from torch import Tensor

from retrace.blending.blend import BlendSettings, keep_source
from retrace.blending.decoder import reconstruct_background
from retrace.blending.paste import paste_background
from retrace.blending.poisson import poisson_blend
from retrace.blending.sample import Sampling, sample_blended
from retrace.clip_guidance.ranking import Region, rank_by_clip
from retrace.hosts.diffusers import DiffusersHost
from retrace.metrics import eight_bit_difference
from retrace.models.clip.model import ImageTextModel, load_image_text_model
from retrace.models.pebble.scenes import scene_rng

from .applications import APPLICATIONS, Recipe, Task
from .results import Section, Table, add_write
from .seam import border_gradient

SECTION = Section(
    "blending",
    "Edits under a mask",
    "Blend Step, 12 to 20 steps. Share of right edits by the scene parser, of a single sample and of the one of "
    "several that Rank by CLIP puts first. The scenes hold one object (remove: one or two), masks are generous "
    "(boxes, half of the image in the median), scribbles agree with the words.",
)
SEAM = Section(
    "blending.seam",
    "The border of the mask",
    "How steep the image is across the border of the mask after a paste, beside the source at the same place.",
)
FIRST = {"heldout": 500_000, "train": 900_000}
"""Of the scenes that are looked at; no other measurement, and no training, sees these."""
COLUMNS = "single", "ranked first", "by region", "any", "outside identical", "evaluations", "seconds"
BATCH = 16
REGIONS = cast("tuple[Region, ...]", get_args(Region))
SEAM_SCENES = 8  # images whose decoder is trained, half a minute each


@dataclass
class Tally:
    """What was seen of one application; every list holds one entry per task, ``single`` and ``same`` one per sample."""

    single: list[bool] = field(default_factory=list)
    best: dict[Region, list[bool]] = field(default_factory=lambda: {region: [] for region in REGIONS})
    any: list[bool] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0

    def cells(self, recipe: Recipe) -> tuple[str, ...]:
        """What the table says, in the order of :data:`COLUMNS`."""
        best = mean(self.best[recipe.rank])
        ranks = ", ".join(f"{region} {mean(hits):.0%}" for region, hits in self.best.items())
        count = len(self.single)
        shares = f"{mean(self.single):.1%}", f"{best:.0%}", ranks, f"{mean(self.any):.0%}", f"{mean(self.same):.0%}"
        return *shares, f"{self.evaluations / count:.0f}", f"{self.seconds / count:.2f}"


def paint(host: Any, tasks: list[Task], recipe: Recipe, seed: int, candidates: int = 1) -> tuple[Tensor, int]:
    """Edits ``[B, H, W, 3]`` as the VAE decodes them, ``candidates`` per task, and the evaluations they took."""
    sigmas = host.sigmas("ddim_uniform", recipe.steps)[-max(1, round(recipe.strength * recipe.steps)) - 1 :]
    keep, start, mask = (torch.stack([getattr(t, name) for t in tasks]) for name in ("keep", "start", "mask"))
    source = host.encode_image(keep)
    begin = source if all(t.start is t.keep for t in tasks) else host.encode_image(start)
    source, begin, mask = (x.repeat_interleave(candidates, 0) for x in (source, begin, mask))
    settings = BlendSettings(noise=recipe.noise, cells=recipe.cells, stages=recipe.shrink, seed=seed)
    blend = keep_source(source, mask, host.parametrisation, settings, host.downscale)
    words = {name: [getattr(t, name) for t in tasks for _ in range(candidates)] for name in ("prompt", "negative")}
    walk = Sampling(highest=float(host.training_sigmas()[-1]), scale=recipe.guidance, seed=seed)

    def method(model: Any, x0: Tensor, conds: Any) -> tuple[Tensor, int]:
        done = sample_blended(model, x0, sigmas, blend, conds["prompt"], conds["negative"], settings=walk)
        return done, int(model.evaluations)

    latent, evaluations = host.run(begin, {name: host.encode_text(text) for name, text in words.items()}, method)
    return host.decode_latent(latent).float(), evaluations


def measure(
    host: Any, clip: ImageTextModel, name: str, scenes: int, candidates: int, split: str, first: int
) -> tuple[Tally, Recipe]:
    make, recipe = APPLICATIONS[name]
    tasks = [task for index in range(scenes) for task in make(scene_rng(split, first + index), recipe)]
    tally, together = Tally(), max(1, BATCH // candidates)
    for begin in range(0, len(tasks), together):
        part = tasks[begin : begin + together]
        started = time.perf_counter()
        decoded, evaluations = paint(host, part, recipe, begin, candidates)
        tally.seconds += time.perf_counter() - started
        tally.evaluations += evaluations
        keep, mask = (
            torch.stack([getattr(t, name) for t in part]).repeat_interleave(candidates, 0) for name in ("keep", "mask")
        )
        pasted = paste_background(decoded, keep, mask, recipe.feather)
        tally.same += ((eight_bit_difference(pasted, keep) * (mask == 0)).flatten(1).amax(1) == 0).tolist()
        for task, images in zip(part, pasted.split(candidates), strict=True):
            hits = [task.success(image) for image in images.movedim(-1, 1)]
            tally.single += hits
            tally.any.append(any(hits))
            for region in REGIONS:
                ranked = rank_by_clip(images, task.score, clip, task.mask[None], region)
                tally.best[region].append(hits[ranked.order[0]])
    return tally, recipe


def seams(host: Any, scenes: int, split: str, first: int) -> dict[str, tuple[float, int]]:
    """Border gradient of each way to paste over that of the source, of all applications that keep a surrounding."""
    steep: dict[str, list[float]] = {}
    names = ("replace", "add", "remove")
    for name in names:
        make, recipe = APPLICATIONS[name]
        tasks = [task for index in range(scenes) for task in make(scene_rng(split, first + index), recipe)]
        tasks = [task for task in tasks if not bool(task.mask.all())]  # a large object's box may be the whole image
        for begin in range(0, len(tasks), BATCH):
            part = tasks[begin : begin + BATCH]
            keep, mask = torch.stack([t.keep for t in part]), torch.stack([t.mask for t in part])
            decoded, _ = paint(host, part, recipe, seed=begin)
            some = slice(0, max(0, -(-SEAM_SCENES // len(names)) - begin))
            ways = {
                "source": keep,
                "as decoded": decoded,
                "hard paste": paste_background(decoded, keep, mask),
                "feathered paste, 3 px": paste_background(decoded, keep, mask, 3),
                "feathered paste, 6 px": paste_background(decoded, keep, mask, 6),
                "Poisson": poisson_blend(decoded, keep, mask),
            }
            if some.stop:
                rebuilt = reconstruct_background(host, decoded[some], keep[some], mask[some]).image
                ways |= {"source of these": keep[some], "hard paste of these": ways["hard paste"][some]}
                ways |= {"decoder reconstruction": rebuilt}
                ways |= {"decoder reconstruction, pasted": paste_background(rebuilt, keep[some], mask[some])}
            for way, images in ways.items():
                steep.setdefault(way, []).extend(border_gradient(images, mask[: len(images)]).tolist())
    return {way: (mean(values), len(values)) for way, values in steep.items()}


@contextlib.contextmanager
def precision(bf16: bool) -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100, help="of each application")
    parser.add_argument("--candidates", type=int, default=8, help="samples of each scene that are ranked")
    parser.add_argument("--only", nargs="*", choices=[*APPLICATIONS, "seam"], help="the applications to run")
    parser.add_argument("--split", choices=list(FIRST), default="heldout")
    parser.add_argument("--start", type=int, help="index of the first scene")
    parser.add_argument("--bf16", action="store_true", help="half the time on processors that know bfloat16")
    add_write(parser)
    args = parser.parse_args()
    first = FIRST[args.split] if args.start is None else args.start
    host, clip = DiffusersHost.load(None), load_image_text_model()
    conditions = f"{args.scenes} {args.split} scenes from {first} on, {args.candidates} samples each"
    print(f"{conditions}\n")
    chosen = [name for name in APPLICATIONS if not args.only or name in args.only]
    if chosen:
        table = Table("application", *COLUMNS)
        for name in chosen:
            with precision(args.bf16):
                tally, recipe = measure(host, clip, name, args.scenes, args.candidates, args.split, first)
            table.add(name, *tally.cells(recipe))
        if args.write:
            SECTION.write(table, conditions)
    if not args.only or "seam" in args.only:
        table = Table("paste", "gradient across the border", "over the source's", "images")
        found = seams(host, args.scenes, args.split, first)
        for way, (value, count) in found.items():
            source = found["source of these" if count == found.get("source of these", (0, -1))[1] else "source"][0]
            table.add(way, f"{value:.4f}", f"{value / source:.2f}", str(count))
        if args.write:
            SEAM.write(table, f"{args.scenes} {args.split} scenes of each of three applications from {first} on")


if __name__ == "__main__":
    main()
