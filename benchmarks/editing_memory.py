"""``python -m benchmarks.editing_memory sd15``: what editing by words costs at 512 px on a real-sized model in ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set (``--cpu`` as for ComfyUI). The models have SD1.5's or SDXL's
shapes and random weights. Every stage of the graphs runs for a few steps, as the memory does not grow with more; the
table shows peaks above the loaded weights, network evaluations and seconds per step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .large_models import Peak, arguments, build, conditions, use_comfyui
from .results import Section, Table, machine

if TYPE_CHECKING:
    from retrace.core.trajectory import Trajectory

TEXTS = ["a photo of a red car on a beach", "a photo of a blue car on a beach"]
GUIDANCE = 7.5
SECTION = Section(
    "editing_memory",
    "What editing by words costs",
    "A model of real size with random weights in ComfyUI: peak of memory above the weights, and seconds per step.",
)


def main() -> None:
    args = arguments(__doc__, steps=4)
    use_comfyui()
    import comfy.sample
    import torch

    from retrace import prompt_to_prompt as p2p
    from retrace.hosts.comfyui import ComfyHost
    from retrace.hosts.comfyui.latents import noise_samples
    from retrace.hosts.comfyui.patches.direct_inversion import patch_direct_inversion
    from retrace.hosts.comfyui.patches.prompt_to_prompt import patch_prompt_to_prompt
    from retrace.hosts.comfyui.prompts import TokenisedPrompts
    from retrace.hosts.comfyui.runs.edit_friendly import prepare_edit_friendly
    from retrace.hosts.comfyui.runs.inversion import invert_latent
    from retrace.hosts.comfyui.runs.null_text import optimise
    from retrace.inversion.edit_friendly import EditFriendlySettings
    from retrace.inversion.invert import InversionSettings
    from retrace.inversion.null_text.settings import NullTextSettings

    model, clip = build(args.model, getattr(torch, args.dtype))
    host = ComfyHost(model, clip)
    source, both, empty = (TokenisedPrompts(clip, texts).encode() for texts in (TEXTS[:1], TEXTS, [""]))
    prompts = TokenisedPrompts(clip, TEXTS).read()
    blend = p2p.local_blend(prompts, p2p.BlendWords(["car"]))
    edit = p2p.plan(prompts[0], prompts[1:], p2p.PlanSettings(cross_replace=(0.0, 0.8), self_replace=(0.0, 0.4)), blend)
    two_changes = NullTextSettings(GUIDANCE, iterations=2, early_stop=0.0)
    cells = args.size // 8
    latent = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    sigmas = host.sigmas("normal", args.steps)

    def sampled(patched: Any, positive: Any, negative: Any, noise: Any) -> Any:
        sampler = comfy.samplers.sampler_object("euler")
        silence = torch.zeros_like(noise)
        return comfy.sample.sample_custom(
            patched, silence, GUIDANCE, sampler, sigmas, positive, negative, noise, disable_pbar=True
        )

    def inverted() -> Trajectory:
        return invert_latent(host, latent, sigmas, source, InversionSettings(), verify=False).trajectory

    def edited(held: bool) -> Any:
        patched = patch_prompt_to_prompt(model, edit)
        if held:
            patched = patch_direct_inversion(patched, path)
        return sampled(patched, both, empty, noise.repeat(2, 1, 1, 1))

    stages: dict[str, Callable[[], object]] = {
        "plain sampling, one picture": lambda: sampled(model, source, empty, noise),
        "plain sampling, two pictures": lambda: sampled(model, both, empty, noise.repeat(2, 1, 1, 1)),
        "DDIM inversion": inverted,
        "edit-friendly inversion": lambda: prepare_edit_friendly(
            host, latent, sigmas, source, empty, EditFriendlySettings(3.5, seed=0)
        ),
        "null-text optimisation": lambda: optimise(host, path, source, empty, two_changes),
        "Prompt-to-Prompt, local blend": lambda: edited(held=False),
        "Direct Inversion + Prompt-to-Prompt, local blend": lambda: edited(held=True),
    }
    with torch.inference_mode():
        path = inverted()  # loads the model and fills the allocator's pools
        noise = noise_samples(host, path)
        weights = sum(p.numel() * p.element_size() for p in model.model.parameters()) / 1e6
        print(f"{conditions(args)}, weights {weights:.0f} MB\n", flush=True)
        table = Table("stage", "peak above the weights", "seconds a step")
        for name, stage in stages.items():
            if args.only and not any(word.lower() in name.lower() for word in args.only):
                continue
            begun = time.perf_counter()
            with Peak() as peak:
                stage()
            seconds = (time.perf_counter() - begun) / args.steps
            table.add(name, f"{peak.peak:.0f} MB", f"{seconds:.1f}")
    if args.write:
        SECTION.of(args.model).write(table, f"{conditions(args)}, weights {weights:.0f} MB", machine(args.cpu))


if __name__ == "__main__":
    main()
