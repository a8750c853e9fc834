"""``python -m benchmarks.gradient_memory``: what gradients cost in memory beside a plain prediction, inside ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set. It builds SD1.5's UNet with random weights (3.4 GB in fp32)
as ComfyUI's loaders do and prints peaks above the loaded model: of a plain prediction, and of a gradient to the latent.
A second copy of the weights would show as +3.4 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .large_models import Peak, build, use_comfyui
from .results import Section, Table, add_write, machine

SECTION = Section(
    "gradient_memory",
    "What gradients cost in memory",
    "SD1.5's UNet with random weights in ComfyUI, fp32: peak of memory above the loaded model.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    add_write(parser)
    args = parser.parse_args()
    use_comfyui()
    import torch

    from retrace.hosts.comfyui import ComfyHost

    model, _ = build("sd15", torch.float32)
    with torch.inference_mode():
        host = ComfyHost(model)
        conds = {"positive": [[torch.randn(1, 77, 768), {}]]}
        latent = torch.randn(1, 4, 16, 16)

        def plain(model: Any, x: Any, c: Any) -> Any:
            return model.denoised(x, 5.0, c["positive"])

        def gradient(model: Any, x: Any, c: Any) -> Any:
            with model.differentiable():
                x = x.clone().requires_grad_(True)
                return torch.autograd.grad(model.denoised(x, 5.0, c["positive"]).square().sum(), x)[0]

        def measured(method: Callable[..., Any], gradients: bool) -> tuple[float, Any]:
            host.run(latent, conds, method, gradients=gradients)  # loads the model and fills the allocator's pools
            with Peak() as peak:
                result = host.run(latent, conds, method, gradients=gradients)
            return peak.peak, result

        before_mb, before = measured(plain, False)
        gradient_mb, _ = measured(gradient, True)
        _, after = measured(plain, False)
        weights_mb = sum(p.numel() * p.element_size() for p in host.model.model.parameters()) / 1e6
        same = "the same bits" if torch.equal(before, after) else "OTHER bits"
        conditions = f"weights {weights_mb:.0f} MB; plain predictions before and after have {same}"
        print(f"{conditions}\n")
        table = Table("what", "peak above the weights")
        table.add("plain prediction", f"{before_mb:.0f} MB")
        table.add("gradient to the latent", f"{gradient_mb:.0f} MB")
    if args.write:
        SECTION.write(table, conditions, machine(args.cpu))


if __name__ == "__main__":
    main()
