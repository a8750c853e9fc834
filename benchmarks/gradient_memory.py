"""``python -m benchmarks.gradient_memory``: what gradients cost in memory beside a plain prediction, inside ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set. It builds SD1.5's UNet with random weights (3.4 GB in fp32)
as ComfyUI's loaders do and prints peaks above the loaded model: of a plain prediction, and of a gradient to the latent.
A second copy of the weights would show as +3.4 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .large_models import Peak, build, use_comfyui


def main() -> None:
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
        print(f"weights {weights_mb:.0f} MB; peak above them: plain {before_mb:.0f} MB, gradient {gradient_mb:.0f} MB")
        print(f"plain output bit-identical before and after: {bool(torch.equal(before, after))}")


if __name__ == "__main__":
    main()
