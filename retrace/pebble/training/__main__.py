"""``python -m retrace.pebble.training --minutes 120``: train Pebble from nothing, resumable, on CPU or GPU."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from . import clip, export, unet, vae
from .data import ScenePool
from .stage import Stage, best_device

# How the time is shared; the UNet has the most to learn.
SHARES = {"vae": 0.27, "clip": 0.09, "unet": 0.64}


def round_to_half(model: torch.nn.Module) -> torch.nn.Module:
    """Later stages must see the weights that ship."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half().float())
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0, help="wall-clock budget of all stages together")
    parser.add_argument("--work", type=Path, default=Path("output/pebble"), help="checkpoints, for resuming")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "weights", help="where the model goes")
    parser.add_argument("--scenes", type=int, default=12_000, help="training scenes held in memory")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log = logging.getLogger("retrace.pebble")
    seconds = {name: 60 * args.minutes * share for name, share in SHARES.items()}

    log.info("rendering %d scenes; training on %s", args.scenes, best_device())
    pool = ScenePool(args.scenes)
    stages: dict[str, Stage] = {"vae": vae.train(args.work, seconds["vae"], pool)}
    autoencoder = round_to_half(stages["vae"].model)
    latents = unet.cache_latents(autoencoder, pool, args.work / "latents.pt")
    scaling_factor = round(1 / float(latents.std()), 5)
    export.write_vae(args.out, autoencoder, scaling_factor)
    export.write_preview(args.out, latents[:512] * scaling_factor, pool.images[:512])

    stages["clip"] = clip.train(args.work, seconds["clip"], pool)
    export.write_clip(args.out, stages["clip"].model)

    from transformers import CLIPTextModel

    text_encoder: Any = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32)
    text_encoder = text_encoder.to(stages["clip"].device).eval().requires_grad_(False)
    stages["unet"] = unet.train(args.work, seconds["unet"], pool, latents * scaling_factor, text_encoder)
    export.write_unet(args.out, stages["unet"].model)
    export.write_tokenizer(args.out)
    export.write_pipeline(args.out)
    card = {"scenes": args.scenes, "scaling_factor": scaling_factor}
    export.write_card(args.out, card | {name: stage.summary() for name, stage in stages.items()})
    log.info("written to %s; now run: python -m benchmarks.pebble --write-card", args.out)


if __name__ == "__main__":
    main()
