"""``python -m benchmarks.null_text``: how well guided sampling comes back to a picture, and the paper's ablations.

Pebble, held-out scenes, 50 steps, guidance 7.5, captions that leave out the ground. PSNR of the picture in dB (mean
over the scenes), network evaluations and backward passes per picture without the inversion, seconds per picture.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from retrace.core.sampling import sample_ddim
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion.invert import invert
from retrace.inversion.null_text.optimise import NullText, optimise_null_text
from retrace.inversion.null_text.settings import NullTextSettings
from retrace.metrics import psnr
from retrace.models.pebble.scenes import Scene, heldout, render_batch

from .pebble import to_nhwc
from .results import Section, Table, add_write

SECTION = Section(
    "null_text",
    "Null-text optimisation",
    "How well guided sampling returns to an image whose caption leaves out the ground: PSNR, and network evaluations "
    "and backward passes per image without the inversion.",
)
STEPS, GUIDANCE = 50, 7.5
FIRST = 300_000  # of the held-out scenes; no other measurement looks at these

VARIANTS: dict[str, NullTextSettings] = {
    "null-text (default)": NullTextSettings(GUIDANCE),
    "null-text, the reference's loop": NullTextSettings(GUIDANCE).reference(),
    "one embedding for all steps": NullTextSettings(GUIDANCE, "global"),
    "random pivot": NullTextSettings(GUIDANCE, "random_pivot"),
    "no pivot": NullTextSettings(GUIDANCE, "no_pivot"),
    "the prompt instead (textual inversion)": NullTextSettings(GUIDANCE, "prompt"),
    "the prompt, no pivot": NullTextSettings(GUIDANCE, "prompt_no_pivot"),
}


def walk_back(model: Any, found: NullText, cond: Any, uncond: Any) -> Tensor:
    """Sample with the embeddings of every step."""
    x = found.start.to(model.device)
    for i, embedding in enumerate(found.embeddings):
        own = embedding.to(model.device)
        pair = (cond.with_embedding(own), uncond) if found.replaces == "cond" else (cond, uncond.with_embedding(own))
        x = sample_ddim(model, x, found.sigmas[i : i + 2], *pair, GUIDANCE)
    return x


def measure(host: DiffusersHost, scene: Scene, settings: NullTextSettings | None) -> tuple[float, int, int]:
    """PSNR, evaluations and backward passes; without ``settings`` that of plain guided sampling."""
    picture = to_nhwc(render_batch([scene]))
    sigmas = host.sigmas("ddim_uniform", STEPS)
    conds = {"cond": host.encode_text(scene.caption(with_ground=False)), "uncond": host.encode_text("")}

    def method(model: Any, latent: Tensor, c: Any) -> tuple[Tensor, int, int]:
        cond, uncond = c["cond"], c["uncond"]
        path = invert(model, latent, sigmas, cond)
        if settings is None:
            return sample_ddim(model, path.noise, sigmas, cond, uncond, GUIDANCE), 2 * STEPS, 0
        found = optimise_null_text(model, path, cond, uncond, settings, only_text_differs=True)
        return walk_back(model, found, cond, uncond), found.evaluations, found.backwards

    back, evaluations, backwards = host.run(host.encode_image(picture), conds, method, gradients=True)
    return float(psnr(host.decode_latent(back), picture)[0]), evaluations, backwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="words of the variants' names")
    add_write(parser)
    args = parser.parse_args()
    host = DiffusersHost.load(None)
    scenes = heldout(args.scenes, FIRST)
    pictures = to_nhwc(render_batch(scenes))
    bound = float(psnr(host.decode_latent(host.encode_image(pictures)), pictures).mean())
    conditions = f"{args.scenes} scenes, {STEPS} steps, guidance {GUIDANCE}, autoencoder {bound:.2f} dB"
    print(f"{conditions}\n")
    table = Table("embeddings", "PSNR", "evaluations", "backward passes", "seconds")
    for name, settings in {"plain (DDIM inversion)": None, **VARIANTS}.items():
        if args.only and not any(word.lower() in name.lower() for word in args.only):
            continue
        start = time.perf_counter()
        results = torch.tensor([measure(host, scene, settings) for scene in scenes])
        seconds = (time.perf_counter() - start) / len(scenes)
        db, evaluations, backwards = results.mean(0).tolist()
        table.add(name, f"{db:.2f} dB", f"{evaluations:.0f}", f"{backwards:.0f}", f"{seconds:.1f}")
    if args.write:
        SECTION.write(table, conditions)


if __name__ == "__main__":
    main()
