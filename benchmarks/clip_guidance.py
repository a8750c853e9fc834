"""``python -m benchmarks.clip_guidance``: what CLIP guidance alone does on Pebble, and what of it matters.

A red circle of a held-out scene is to become a blue square under its mask. The sampler gets **no words** (an empty
prompt, no classifier-free guidance); all that says "a blue square" is Pebble's CLIP. Success is the scene parser's, for
one sample each.

The first table compares the gradient's paths and leaves parts out; the second is local CLIP-guided diffusion, without
Blend Step, at several weights of the background (the paper's figure on lambda).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrace.blending.blend import BlendSettings, keep_source
from retrace.blending.paste import paste_background
from retrace.blending.sample import Sampling, first_latent, sample_blended
from retrace.clip_guidance import Augmentations, ClipGuidance, GuidedRun, Look, Schedule, View, Weights
from retrace.core.sampling import ancestral_steps, cfg, sample, steered
from retrace.hosts.diffusers import DiffusersHost
from retrace.masks import mask_precision
from retrace.models.clip.model import ImageTextModel, load_image_text_model
from retrace.models.pebble.scenes import Scene, instance_masks, render_batch
from tools.scene_parser import found, parse

from .pebble import red_circle_scenes, to_nchw, to_nhwc
from .results import Section, Table, add_write

SECTION = Section(
    "clip_guidance",
    "CLIP guidance",
    "A red circle becomes a blue square under its mask with **no words for the sampler**; only Pebble's CLIP says "
    "what to paint. Success: a blue square in the mask, by the scene parser, one sample per scene. Blue: a blue "
    "object in the mask.",
)
BACKGROUND = Section(
    "clip_guidance.background",
    "Local CLIP-guided diffusion",
    "Without Blend Step, `x0` by weights: the weight of the background (*background_mse*) against the edit.",
)
STEPS = 40
FIRST = 600_000  # of the held-out scenes; no other measurement looks at these
PROMPT = "a blue square"
MARGIN, LEVEL, LEVELS = 4.0, 3, 5  # of the mask: that of the example graphs
LAMBDAS = (0.0, 1e3, 1e4, 3e4)  # of the background; the words have 10000


@dataclass(frozen=True)
class Variant:
    """One row: ``schedule`` None is without guidance, ``weights.background_mse`` above 0 without Blend Step."""

    schedule: Schedule | None
    weights: Weights = Weights()  # noqa: RUF009 - frozen
    augmentations: Augmentations = Augmentations()  # noqa: RUF009 - frozen
    view: View = "region"
    look: Look = Look()  # noqa: RUF009 - frozen
    blend: bool = True


@dataclass(frozen=True)
class Outcome:
    """Of one edit: what the parser finds, the background's MSE before the paste, and the cost."""

    success: bool
    colour: bool
    background: float
    evaluations: int
    backwards: int


def edit(
    host: DiffusersHost, clip: ImageTextModel, scene: Scene, variant: Variant, seed: int
) -> tuple[Outcome, Tensor]:
    """One guided edit and its image ``[1, H, W, 3]``."""
    picture = to_nhwc(render_batch([scene]))
    mask = mask_precision(instance_masks(scene, MARGIN)[:1], LEVEL, LEVELS)
    sigmas = host.sigmas("ddim_uniform", STEPS)
    latent = host.encode_image(picture)
    guidance = ClipGuidance(
        clip,
        PROMPT,
        mask,
        picture,
        weights=variant.weights,
        augmentations=variant.augmentations,
        view=variant.view,
        look=variant.look,
    )
    highest = float(host.training_sigmas()[-1])

    def work(model: Any, x0: Tensor, conds: Any) -> tuple[Tensor, int, int]:
        run = None
        if variant.schedule is not None:
            run = GuidedRun(
                guidance,
                variant.schedule,
                sigmas,
                host.decode_differentiable,
                model.differentiable,
                model.parametrisation,
                seed,
            )
        guide = run.guide if run else None
        if variant.blend:
            settings = BlendSettings(noise="fresh", cells="area", seed=seed)
            blend = keep_source(x0, mask, host.parametrisation, settings, host.downscale)
            walk = Sampling(highest=highest, seed=seed, guide=guide)
            found_latent = sample_blended(model, x0, sigmas, blend, conds["empty"], settings=walk)
        else:
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
            start = first_latent(x0, noise, float(sigmas[0]), highest, host.parametrisation)
            estimate = cfg(model, conds["empty"])
            steps = ancestral_steps(torch.Generator().manual_seed(seed + 1), host.parametrisation)
            found_latent = sample(model, start, sigmas, steered(estimate, guide) if guide else estimate, steps)
        return found_latent, model.evaluations, run.backwards if run else 0

    back, evaluations, backwards = host.run(latent, {"empty": host.encode_text("")}, work, gradients=True)
    decoded = host.decode_latent(back)
    outside = mask[0] < 0.5
    mse = float((decoded - picture)[0][outside].square().mean())
    image = paste_background(decoded, picture, mask, 3.0) if variant.blend else decoded
    seen = to_nchw(image)[0]
    inside = [o for o in parse(seen).objects if mask[0][int(o.y), int(o.x)] > 0.5]
    hit = found(seen, "blue", "square", mask[0])
    return Outcome(hit, any(o.colour == "blue" for o in inside), mse, evaluations, backwards), image


def measure(
    host: DiffusersHost, clip: ImageTextModel, given: list[Scene], variant: Variant
) -> tuple[list[float], float]:
    """Means of the outcomes' fields, and seconds per edit."""
    begun = time.perf_counter()
    outcomes = [edit(host, clip, scene, variant, seed)[0] for seed, scene in enumerate(given)]
    rows = torch.tensor([[float(v) for v in vars(o).values()] for o in outcomes])
    return rows.mean(0).tolist(), (time.perf_counter() - begun) / len(given)


def variants(host: DiffusersHost) -> dict[str, Variant]:
    """The rows of the first table."""
    last = float(host.training_sigmas()[249])  # end_percent 0.75: the last steps clean up
    x0 = Variant(Schedule("x0", last=last, dsg=0.7))
    full = Variant(Schedule("full", last=last, dsg=1.5))
    return {
        "no guidance": Variant(None),
        "x0": x0,
        "full": full,
        "x0, one plain view": replace(x0, augmentations=Augmentations(1)),
        "full, one plain view": replace(full, augmentations=Augmentations(1)),
        "x0, weights instead of dsg": replace(x0, schedule=Schedule("x0", last=last), weights=Weights(clip=10000.0)),
        "full, weights instead of dsg": replace(full, schedule=Schedule("full", last=last)),
        "x0, every second step": Variant(Schedule("x0", last=last, dsg=0.7, every=2)),
        "x0, mask before views (parity)": replace(x0, look=Look.reference()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="train: to choose settings")
    parser.add_argument("--only", nargs="*", help="names of rows; 'lambda' is the second table")
    add_write(parser)
    args = parser.parse_args()
    host, clip = DiffusersHost.load(None), load_image_text_model()
    given = red_circle_scenes(args.scenes, FIRST, args.split)

    def wanted(name: str) -> bool:
        return not args.only or name in args.only

    conditions = f"{args.scenes} {args.split} scenes, {STEPS} steps, euler_ancestral"
    print(f"{conditions}, no words for the sampler\n")
    table = Table("guidance", "success", "blue", "evaluations", "backward passes", "seconds")
    for name, variant in variants(host).items():
        if wanted(name):
            (success, colour, _, evaluations, backwards), seconds = measure(host, clip, given, variant)
            shares = f"{success:.0%}", f"{colour:.0%}"
            table.add(name, *shares, f"{evaluations:.0f}", f"{backwards:.0f}", f"{seconds:.1f}")
    if args.write and table.rows:
        SECTION.write(table, conditions)
    if wanted("lambda"):
        print()
        table = Table("background weight", "success", "blue", "background MSE", "PSNR")
        for weight in LAMBDAS:
            base = variants(host)["x0, weights instead of dsg"]
            local = replace(base, blend=False, weights=replace(base.weights, background_mse=weight))
            (success, colour, mse, *_), _ = measure(host, clip, given, local)
            db = -10 * torch.tensor(mse).log10()
            table.add(f"{weight:g}", f"{success:.0%}", f"{colour:.0%}", f"{mse:.5f}", f"{db:.1f} dB")
        if args.write:
            BACKGROUND.write(table, conditions)


if __name__ == "__main__":
    main()
