"""``python -m benchmarks.guidance_cost sd15``: what a step under CLIP Guidance costs on a real-sized model in ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set (``--cpu`` as for ComfyUI). UNet, VAE and a CLIP ViT-B/16 have
their real shapes and random weights. Every row samples a few steps at cfg 7.5 with 8 views; the table shows seconds and
peak memory above the loaded weights, passes of the network per step, and how many of these are kept for a backward.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from .large_models import Peak, arguments, build, build_vae, conditions, use_comfyui
from .results import Section, Table, machine

GUIDANCE, VIEWS = 7.5, 8
SECTION = Section(
    "guidance_cost",
    "What a step under CLIP Guidance costs",
    "A model of real size with random weights in ComfyUI, with a CLIP ViT-B/16: passes of the model per step, how "
    "many of them are kept for the backward pass, peak of memory above the weights, and seconds per step.",
)


def image_text() -> Any:
    """A CLIP ViT-B/16 of random weights."""
    import open_clip
    import torch

    from retrace.models.clip.model import ImageTextModel

    with torch.inference_mode(False):
        config = open_clip.get_model_config("ViT-B-16")
        model = open_clip.CLIP(**config).eval().requires_grad_(False)
    return ImageTextModel(model, open_clip.get_tokenizer("ViT-B-16"), "random ViT-B-16")


def main() -> None:
    args = arguments(__doc__, steps=2)
    use_comfyui()
    import comfy.patcher_extension
    import comfy.sample
    import torch

    from retrace.clip_guidance import Augmentations, ClipGuidance, Schedule
    from retrace.hosts.comfyui.patches.clip_guidance import patch_clip_guidance
    from retrace.hosts.comfyui.prompts import TokenisedPrompts

    dtype = getattr(torch, args.dtype)
    model, text = build(args.model, dtype)
    clip, vae = image_text(), build_vae(dtype)
    positive, negative = (TokenisedPrompts(text, [words]).encode() for words in ("a photo of a beach", ""))
    cells = args.size // 8
    noise = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, args.size, args.size)
    guidance = ClipGuidance(clip, "a red car", mask, augmentations=Augmentations(VIEWS))
    counts: Counter[str] = Counter()

    def count(executor: Any, x: Any, *rest: Any, **named: Any) -> Any:
        counts["forward"] += len(x)
        counts["kept"] += len(x) * x.requires_grad
        return executor(x, *rest, **named)

    rows: dict[str, Callable[[], Any]] = {
        "plain": lambda: model,
        "x0, linear colours": lambda: patch_clip_guidance(model, guidance, Schedule("x0")),
        "x0, VAE": lambda: patch_clip_guidance(model, guidance, Schedule("x0"), vae=vae),
        "full, linear colours": lambda: patch_clip_guidance(model, guidance, Schedule("full")),
        "full, VAE": lambda: patch_clip_guidance(model, guidance, Schedule("full"), vae=vae),
    }

    def sampled(patched: Any) -> None:
        patched = patched.clone()
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", count)
        comfy.sample.sample(
            patched, noise, args.steps, GUIDANCE, "euler", "normal", positive, negative, noise * 0, disable_pbar=True
        )

    with torch.inference_mode():
        sampled(model)  # loads the weights
        ran = f"{conditions(args)}, cfg {GUIDANCE}, {VIEWS} views"
        print(f"{ran}\n", flush=True)
        table = Table(
            "guidance", "forward", "kept for backward", "peak above the weights", "seconds", "of a plain step"
        )
        plain = 0.0
        for name, patched in rows.items():
            if args.only and name != "plain" and not any(word.lower() in name.lower() for word in args.only):
                continue
            counts.clear()
            begun = time.perf_counter()
            with Peak() as peak:
                sampled(patched())
            seconds = (time.perf_counter() - begun) / args.steps
            plain = plain or seconds
            passes = f"{counts['forward'] / args.steps:g}", f"{counts['kept'] / args.steps:g}"
            table.add(name, *passes, f"{peak.peak:.0f} MB", f"{seconds:.1f}", f"{seconds / plain:.1f} x")
    if args.write:
        SECTION.of(args.model).write(table, ran, machine(args.cpu))


if __name__ == "__main__":
    main()
