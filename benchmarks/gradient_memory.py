"""``python -m benchmarks.gradient_memory``: what gradients cost in memory beside a plain prediction, inside ComfyUI.

Run it with ComfyUI's Python and ``COMFYUI_PATH`` set. It builds SD1.5's UNet with random weights (3.4 GB in fp32)
as ComfyUI's loaders do and prints peaks above the loaded model: of a plain prediction, and of a gradient to the latent.
A second copy of the weights would show as +3.4 GB.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


class Peak:
    """Highest resident memory of this process (or of the GPU) while the block runs, in MB above the start."""

    def __enter__(self) -> Peak:
        self.start, self.peak, self.running = resident(), 0.0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()


def resident() -> float:
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def sd15() -> Any:
    """A MODEL with SD1.5's UNet and random weights, built under inference mode like any loaded checkpoint."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }
    description = comfy.supported_models.SD15(config)
    description.set_inference_dtype(torch.float32, None)
    model = description.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for weight in model.diffusion_model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def main() -> None:
    sys.path.append(os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu"] if "--cpu" in sys.argv else ["main.py"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    from retrace.hosts.comfyui import ComfyHost

    with torch.inference_mode():
        host = ComfyHost(sd15())
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
