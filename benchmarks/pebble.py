"""``python -m benchmarks.pebble``: what Pebble can do, and inversion and blending on it, over held-out scenes.

Prints all figures, then the table of those that have a target. ``--write-card`` stores the figures in the card beside
the weights. Evaluation scenes are never trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrace.cli.edit import EditPrompts, EditSettings, edit_image
from retrace.cli.main import example_mask
from retrace.core.sampling import sample_ddim
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion.invert import InversionSettings, Method, invert
from retrace.metrics import psnr
from retrace.models.pebble.clip import load_clip, normalise
from retrace.models.pebble.scenes import Scene, heldout, render_batch, sample_scene, scene_rng
from retrace.models.pebble.weights import weights_folder
from tools.scene_parser import found, parse

from .results import Section, Table, add_write

SECTION = Section(
    "pebble",
    "Pebble",
    "The demo model on held-out scenes, judged by the scene parser where it is about what an image shows. All "
    "figures are in `card.json` beside the weights.",
)
Result = dict[str, float | int]
BATCH = 16
SCENES = {
    "vae_reconstruction": 200,
    "parser_on_truth": 500,
    "clip_retrieval": 640,
    "prompt_following": 200,
    "inversion_round_trip": 50,
    "blend_edits": 100,
}
"""How many scenes each measurement looks at."""
INVERSIONS: tuple[tuple[str, Method, int], ...] = (
    ("ddim_uniform", "ddim", 50),
    ("karras", "ddim", 50),
    ("ddim_uniform", "fixed_point", 25),
    ("ddim_uniform", "fixed_point", 50),
)
"""Scheduler, method and steps of the inversions that are measured. ``ddim_uniform`` spends its steps where the noise is
strong; ``karras`` spends them where DDIM inversion errs, near the picture."""


def to_nhwc(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).contiguous()


def to_nchw(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous()


def batches(items: list[Any]) -> list[list[Any]]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def sample(host: Any, prompts: list[str], steps: int, guidance: float, start: Tensor | None, seed: int) -> Tensor:
    """Guided DDIM samples ``[B, H, W, 3]``, one per prompt, from ``start`` or from noise."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = host.sigmas("ddim_uniform", steps)
    size = host.native_size // host.downscale
    noise = torch.randn(len(prompts), host.latent_channels, size, size, generator=generator)
    x = noise * float(sigmas[0]) if start is None else start
    conds = {"positive": host.encode_text(prompts), "negative": host.encode_text([""] * len(prompts))}

    def method(model: Any, latent: Tensor, c: Any) -> Tensor:
        return sample_ddim(model, latent, sigmas, c["positive"], c["negative"], guidance)

    images: Tensor = host.decode_latent(host.run(x, conds, method))
    return images


def vae_reconstruction(host: Any, count: int) -> Result:
    values = []
    for scenes in batches(heldout(count)):
        images = to_nhwc(render_batch(scenes))
        values.append(psnr(host.decode_latent(host.encode_image(images)), images))
    return {"psnr_db": float(torch.cat(values).mean()), "worst_db": float(torch.cat(values).min())}


def parser_on_truth(count: int) -> Result:
    def right(scene: Scene, image: Tensor) -> bool:
        got = parse(image)
        wanted = sorted((o.colour, o.shape) for o in scene.objects)
        return got.ground == scene.ground.name and sorted((o.colour, o.shape) for o in got.objects) == wanted

    scenes = heldout(count)
    hits = [right(s, i) for s, i in zip(scenes, render_batch(scenes), strict=True)]
    return {"right": sum(hits) / count}


def prompt_following(host: Any, count: int, steps: int = 50, guidance: float = 5.0) -> Result:
    """Share of samples that show the asked colour and shape, and of each alone; captions of scenes with one object."""
    scenes = heldout(count, start=60_000, objects=1)
    found_all, colours, grounds = 0, 0, 0
    for number, part in enumerate(batches(scenes)):
        images = sample(host, [s.caption() for s in part], steps, guidance, None, seed=number)
        for scene, image in zip(part, to_nchw(images), strict=True):
            asked, seen = scene.objects[0], parse(image)
            found_all += found(seen, asked.colour, asked.shape)
            colours += any(o.colour == asked.colour for o in seen.objects)
            grounds += seen.ground == scene.ground.name
    return {"right": found_all / count, "colour": colours / count, "ground": grounds / count}


def clip_retrieval(count: int) -> Result:
    scenes = heldout(count)
    model, tokenize = load_clip()
    return {"top1_of_32": retrieval(model, tokenize, [s.caption() for s in scenes], render_batch(scenes))}


@torch.inference_mode()
def retrieval(model: Any, tokenize: Any, captions: list[str], images: Tensor, among: int = 32) -> float:
    """Share of ``images`` ``[N, 3, H, W]`` in 0..1 whose own caption scores highest among ``among`` different ones."""
    first = {c: i for i, c in reversed(list(enumerate(captions)))}
    order = sorted(first.values())
    hits = total = 0
    for start in range(0, len(order) - among + 1, among):
        which = order[start : start + among]
        image = model.encode_image(normalise(images[which]), normalize=True)
        text = model.encode_text(tokenize([captions[i] for i in which]), normalize=True)
        hits += int(((image @ text.T).argmax(-1) == torch.arange(among)).sum())
        total += among
    return hits / total


def inversion_round_trip(host: Any, count: int) -> Result:
    """How far inversion and sampling at guidance 1 fall below the VAE's own reconstruction, in dB."""
    totals: dict[str, list[Tensor]] = {}
    for scenes in batches(heldout(count)):
        images = to_nhwc(render_batch(scenes))
        latents = host.encode_image(images)
        cond = {"positive": host.encode_text([s.caption() for s in scenes])}
        bound = psnr(host.decode_latent(latents), images)
        for scheduler, method, steps in INVERSIONS:
            sigmas = host.sigmas(scheduler, steps)

            def round_trip(model: Any, x0: Tensor, c: Any, method: Method = method, sigmas: Tensor = sigmas) -> Tensor:
                trajectory = invert(model, x0, sigmas, c["positive"], InversionSettings(method))
                return sample_ddim(model, trajectory.noise.to(x0), sigmas, c["positive"])

            back = host.decode_latent(host.run(latents, cond, round_trip))
            name = f"{method}_{steps}{'' if scheduler == 'ddim_uniform' else '_' + scheduler}_loss_db"
            totals.setdefault(name, []).append(bound - psnr(back, images))
    return {name: float(torch.cat(values).mean()) for name, values in totals.items()}


def red_circle_scenes(count: int, first: int = 120_000, split: str = "heldout") -> list[Scene]:
    """Scenes whose first object is a red circle; at most one other object, which must stay."""
    scenes = []
    for index in range(count):
        rng = scene_rng(split, first + index)
        scene = sample_scene(rng, objects=int(rng.integers(1, 3)))
        circle = replace(scene.objects[0], colour="red", shape="circle")
        scenes.append(replace(scene, objects=(circle, *scene.objects[1:])))
    return scenes


def blend_edits(host: Any, count: int, settings: EditSettings | None = None) -> Result:
    """A red circle becomes a blue square: the edit that ships, with the settings and the mask of the example graph."""
    settings = settings or EditSettings()
    hits: list[bool] = []
    blue: list[bool] = []
    same: list[bool] = []
    for number, scenes in enumerate(batches(red_circle_scenes(count))):
        images = to_nhwc(render_batch(scenes))
        masks = torch.cat([example_mask(s) for s in scenes])
        new = [replace(s.objects[0], colour="blue", shape="square") for s in scenes]
        # The words for the whole picture, as for any model: what the mask leaves alone is named, too.
        wanted = [replace(s, objects=(o, *s.objects[1:])) for s, o in zip(scenes, new, strict=True)]
        before, after = ([s.caption() for s in part] for part in (scenes, wanted))
        edited = edit_image(host, images, masks, EditPrompts(before, after), replace(settings, seed=number)).edited
        hits += [found(i, "blue", "square", m) for i, m in zip(to_nchw(edited), masks, strict=True)]
        for image, mask in zip(to_nchw(edited), masks, strict=True):
            inside = [o for o in parse(image).objects if mask[int(o.y), int(o.x)] > 0.5]
            blue.append(any(o.colour == "blue" for o in inside))
        eight = [(x * 255).round().to(torch.uint8) for x in (edited, images)]
        same += [bool((a[o] == b[o]).all()) for a, b, o in zip(*eight, masks == 0, strict=True)]
    return {"success": sum(hits) / count, "colour": sum(blue) / count, "identical_outside": sum(same) / count}


def speed(host: Any) -> Result:
    image = to_nhwc(render_batch(heldout(1)))
    caption = heldout(1)[0].caption()

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def inversion() -> object:
        sigmas = host.sigmas("ddim_uniform", 50)
        cond = {"positive": host.encode_text([caption])}
        return host.run(host.encode_image(image), cond, lambda m, x, c: invert(m, x, sigmas, c["positive"]))

    sampling = seconds(lambda: sample(host, [caption], 50, 5.0, None, seed=0))
    return {
        "sample_50_steps_s": sampling,
        "inversion_50_steps_s": seconds(inversion),
        "threads": torch.get_num_threads(),
    }


def table_of(results: dict[str, Result]) -> Table:
    """The rows whose measurements ran: what, how much, and the target."""
    rows: tuple[tuple[str, str, str, str], ...] = (
        ("autoencoder", "vae_reconstruction", "{psnr_db:.1f} dB PSNR", "30 dB"),
        ("CLIP: own caption among 32 different ones", "clip_retrieval", "{top1_of_32:.1%}", "95%"),
        ("50-step samples at guidance 5 show colour and shape", "prompt_following", "{right:.1%}", "90%"),
        ("a red circle becomes a blue square, one sample", "blend_edits", "{success:.0%}", "80%"),
        ("return, 50 steps `ddim`, `karras`: loss", "inversion_round_trip", "{ddim_50_karras_loss_db:.2f} dB", "1 dB"),
        ("the same, `ddim_uniform`", "inversion_round_trip", "{ddim_50_loss_db:.2f} dB", ""),
        ("the same, `fixed_point`, 25 steps", "inversion_round_trip", "{fixed_point_25_loss_db:.2f} dB", "like `ddim`"),
        ("one guided sample of 50 steps", "speed", "{sample_50_steps_s:.1f} s", "15 s"),
        ("one inversion of 50 steps", "speed", "{inversion_50_steps_s:.1f} s", "8 s"),
    )
    table = Table("measured", "now", "wanted")
    for what, name, figure, wanted in rows:
        if name in results:
            table.add(what, figure.format(**results[name]), wanted)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of scenes")
    parser.add_argument("--only", nargs="*", help="names of the measurements to run")
    parser.add_argument("--write-card", action="store_true")
    add_write(parser)
    args = parser.parse_args()
    host = DiffusersHost.load(None)

    def n(name: str) -> int:
        return max(BATCH, round(SCENES[name] * float(args.scale)))

    measurements: dict[str, Callable[[], Result]] = {
        "vae_reconstruction": lambda: vae_reconstruction(host, n("vae_reconstruction")),
        "parser_on_truth": lambda: parser_on_truth(n("parser_on_truth")),
        "clip_retrieval": lambda: clip_retrieval(n("clip_retrieval")),
        "prompt_following": lambda: prompt_following(host, n("prompt_following")),
        "inversion_round_trip": lambda: inversion_round_trip(host, n("inversion_round_trip")),
        "blend_edits": lambda: blend_edits(host, n("blend_edits")),
        "speed": lambda: speed(host),
    }
    results: dict[str, Result] = {}
    for name, measure in measurements.items():
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        results[name] = {k: round(v, 4) for k, v in measure().items()}
        figures = ", ".join(f"{k} {v}" for k, v in results[name].items())
        print(f"{name:22} {figures}   ({time.perf_counter() - start:.0f} s)", flush=True)
    print()
    table = table_of(results)
    if args.write:
        SECTION.write(table, "scenes: " + ", ".join(f"{n(name)} of {name}" for name in results if name in SCENES))
    if args.write_card:
        path = weights_folder() / "card.json"
        card = json.loads(path.read_text(encoding="utf-8"))
        card["measured"] = {**card.get("measured", {}), **results}
        path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
