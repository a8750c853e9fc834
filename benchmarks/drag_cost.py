"""``python -m benchmarks.drag_cost sd15``: what dragging costs on a real-sized model in ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set (``--cpu`` as for ComfyUI). The UNet has its real shapes and
random weights. Rows: a change of the latent with the whole network, with the network cut after the feature block, and
with blocks computed twice; a noise level of the Identity LoRA; a step of sampling [reference, edited] under Reference
KV Control. The table shows seconds of one of them, from the second on, and the peak of memory above the loaded weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .large_models import Peak, arguments, build, conditions, use_comfyui
from .results import Section, Table, machine

if TYPE_CHECKING:
    from retrace.core.host import Conditioning, UNetDenoiser
    from retrace.drag.latent.result import Dragged

SECTION = Section(
    "drag_cost",
    "What dragging costs",
    "A model of real size with random weights in ComfyUI: seconds of one change of the latent, of one noise level of "
    "the LoRA or of one step of sampling, and the peak of memory above the weights.",
)


def main() -> None:
    args = arguments(__doc__, steps=2)
    use_comfyui()
    import comfy.sample
    import torch

    from retrace.attention.lora.settings import LoraTraining
    from retrace.drag.latent.edit import drag_points
    from retrace.drag.latent.settings import DragSettings
    from retrace.drag.latent.task import DragSource
    from retrace.drag.points import DragPoints, PointPair
    from retrace.hosts.comfyui import ComfyHost
    from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv
    from retrace.hosts.comfyui.prompts import TokenisedPrompts
    from retrace.hosts.comfyui.runs.identity_lora import train_lora

    model, text = build(args.model, getattr(torch, args.dtype))
    words = TokenisedPrompts(text, ["a photo of a beach"]).encode()
    host, cells = ComfyHost(model), args.size // 8
    picture = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    points = DragPoints((PointPair((0.3, 0.5), (0.7, 0.5)),), torch.zeros(1, args.size, args.size, 3))
    half = torch.zeros(1, args.size, args.size)
    half[:, args.size // 4 :, :] = 1
    sigmas = torch.tensor([4.0, 3.5, 3.0])
    # As many looks as changes, all of them through the whole network.
    usual = DragSettings(changes=args.steps, look_at_end=False, cut=False, cells="sampled", recompute=False)
    ticks: list[float] = []

    def tick(*_: object) -> None:
        ticks.append(time.perf_counter())

    def drag(settings: DragSettings) -> None:
        def method(denoiser: UNetDenoiser, x: torch.Tensor, conds: Mapping[str, Conditioning]) -> Dragged:
            source = DragSource(x, sigmas, conds["words"], noisy=True)
            return drag_points(denoiser, source, points, half, settings, tick)

        host.run(picture * 4, {"words": words}, method, gradients=True)

    def train(recompute: bool) -> None:
        training = LoraTraining(steps=args.steps, batch_size=1, recompute=recompute)
        train_lora(host, picture, words, training, tick)

    def sample() -> None:
        both = picture.repeat(2, 1, 1, 1)
        schedule = (args.steps, 1.0, "euler", "normal")
        patched = patch_reference_kv(model)
        comfy.sample.sample(patched, both, *schedule, words, words, both * 0, callback=tick, disable_pbar=True)

    rows: dict[str, Callable[[], None]] = {
        "a change, whole network": lambda: drag(usual),
        "a change, network cut": lambda: drag(replace(usual, hard_mask=True)),
        "a change, whole network, blocks computed twice": lambda: drag(replace(usual, recompute=True)),
        "a noise level of Identity LoRA": lambda: train(False),
        "the same, blocks computed twice": lambda: train(True),
        "a step of [reference, edited]": sample,
    }
    with torch.inference_mode():
        sample()  # loads the weights
        print(f"{conditions(args)}\n", flush=True)
        table = Table("what", "seconds", "peak above the weights")
        for name, work in rows.items():
            if args.only and not any(word.lower() in name.lower() for word in args.only):
                continue
            ticks.clear()
            with Peak() as peak:
                work()
            seconds = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
            table.add(name, f"{seconds:.1f}", f"{peak.peak:.0f} MB")
    if args.write:
        SECTION.of(args.model).write(table, conditions(args), machine(args.cpu))


if __name__ == "__main__":
    main()
