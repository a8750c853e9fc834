"""SD1.5 and SDXL at their real sizes with random weights, as a ComfyUI holds them; what they compute means nothing.

For speed and memory only. Needs a process with ComfyUI's modules, see :func:`use_comfyui`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from typing import Any, Literal, get_args

from .results import add_write

Kind = Literal["sd15", "sdxl"]

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
UNETS: dict[Kind, dict[str, Any]] = {
    "sd15": {
        **_COMMON,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": {
        **_COMMON,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}


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
    """Memory of this process in MB, or of the GPU where there is one."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    resident_bytes: int = psutil.Process().memory_info().rss
    return resident_bytes / 1e6


def use_comfyui() -> None:
    """Make ComfyUI's modules importable: ``COMFYUI_PATH`` is set, and ``--cpu`` is handed on."""
    sys.path.append(os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu"] if "--cpu" in sys.argv else ["main.py"]
    import comfy.options

    comfy.options.enable_args_parsing()


def arguments(description: str | None, steps: int) -> argparse.Namespace:
    """What the benchmarks of large models are asked on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", choices=get_args(Kind))
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels a side")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--only", nargs="*", help="words of the rows' names")
    parser.add_argument("--cpu", action="store_true")
    add_write(parser)
    return parser.parse_args()


def conditions(args: argparse.Namespace) -> str:
    """What was measured, in words."""
    return f"{args.model}, {args.dtype}, {args.size} px, {args.steps} steps"


def build(kind: Kind, dtype: Any) -> tuple[Any, Any]:
    """MODEL and CLIP with random weights of ``dtype``, built under inference mode like any loaded checkpoint."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import torch

    description = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[kind](UNETS[kind])
    description.set_inference_dtype(dtype, None)
    with torch.inference_mode():
        model = description.get_model({}, "")
        _fill(model.diffusion_model)
        patcher = comfy.model_patcher.ModelPatcher(
            model, management.get_torch_device(), management.unet_offload_device()
        )
        clip = comfy.sd.CLIP(description.clip_target({}), embedding_directory=None)
        _fill(clip.cond_stage_model)
    return patcher, clip


def build_vae(dtype: Any) -> Any:
    """Stable Diffusion's VAE with random weights of ``dtype``."""
    import comfy.sd
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    dd: dict[str, Any] = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
    }
    dd |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.inference_mode():
        network = AutoencoderKL(ddconfig=dd, embed_dim=4)
        _fill(network)
        return comfy.sd.VAE(sd=network.state_dict(), dtype=dtype)


def _fill(network: Any) -> None:
    """Core's loaders leave weights as the memory was. Gains are 1, so that values keep a size that fp16 can hold."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
