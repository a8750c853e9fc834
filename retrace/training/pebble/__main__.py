"""``python -m retrace.training.pebble --minutes 120``: train Pebble from nothing, resumable, on CPU or GPU."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...models.pebble.weights import SHIPPED
from ..stage import Stage, best_device
from . import clip, export, unet, vae
from .data import ScenePool

# How the time is shared; the UNet has the most to learn.
SHARES = {"vae": 0.2, "unet": 0.5, "refine": 0.2, "clip": 0.1}


def round_to_half(model: torch.nn.Module) -> torch.nn.Module:
    """Later stages must see the weights that ship."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half().float())
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0, help="wall-clock budget of these stages together")
    parser.add_argument("--work", type=Path, default=Path("output/pebble"), help="checkpoints, for resuming")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the model goes")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="train these, keep the others")
    parser.add_argument("--scenes", type=int, default=16_000, help="training scenes held in memory")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log = logging.getLogger("retrace.training.pebble")
    whole = sum(SHARES[name] for name in args.only)
    seconds = {name: 60 * args.minutes * SHARES[name] / whole for name in args.only}

    log.info("rendering %d scenes; training on %s", args.scenes, best_device())
    pool = ScenePool(args.scenes)
    stages: dict[str, Stage] = {}
    if "vae" in args.only:
        stages["vae"] = vae.train(args.work, seconds["vae"], pool)
        autoencoder = round_to_half(stages["vae"].model)
        latents = unet.cache_latents(autoencoder, pool, args.work / "latents.pt")
        export.write_vae(args.out, autoencoder, round(1 / float(latents.std()), 5))
    if {"unet", "refine"} & set(args.only):
        autoencoder = vae.load(args.out)
        latents = unet.cache_latents(autoencoder, pool, args.work / "latents.pt") * autoencoder.config.scaling_factor
    if "unet" in args.only:
        export.write_preview(args.out, latents[:512], pool.images[:512])
        stages["unet"] = unet.train(args.work, seconds["unet"], pool, latents)
        export.write_unet(args.out, stages["unet"].model["unet"])
        export.write_text_encoder(args.out, stages["unet"].model["text"])
        export.write_tokenizer(args.out)
        export.write_pipeline(args.out)
    if "refine" in args.only:
        stages["refine"] = unet.refine(args.work, seconds["refine"], pool, latents, export.read_shipped(args.out))
        export.write_unet(args.out, stages["refine"].model["unet"])
    if "clip" in args.only:
        text_encoder = load_file(args.out / "text_encoder" / "model.safetensors")
        stages["clip"] = clip.train(args.work, seconds["clip"], pool, text_encoder)
        export.write_clip(args.out, stages["clip"].model)
    export.write_card(args.out, {name: {"scenes": args.scenes, **stage.summary()} for name, stage in stages.items()})
    log.info("written to %s; now run: python -m benchmarks.pebble --write-card", args.out)


if __name__ == "__main__":
    main()
