"""Tokens from ComfyUI's own CLIP_VISION models, and where image-text models compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "use_swiglu_ffn": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


# DINOv2's positions are for 518 pixels, whatever the configuration says.
@pytest.mark.parametrize(
    ("kind", "size", "patch", "before"),
    [("clip_vision_model", 32, 8, 1), ("siglip_vision_model", 32, 8, 0), ("dinov2", 518, 14, 1)],
)
def test_vision_tokens(comfy_subject: Any, tmp_path: Path, kind: str, size: int, patch: int, before: int) -> None:
    import comfy.clip_vision

    from retrace.hosts.comfyui.image_text import vision_tokens
    from retrace.metrics import structure_distance

    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, "model_type": kind, "image_size": size, "patch_size": patch}), "utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(file))
    generator = torch.Generator().manual_seed(0)
    for name, value in model.model.state_dict().items():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + name.endswith("norm.weight"))
    pictures = torch.rand(2, size, size, 3, generator=generator)
    tokens = vision_tokens(model, pictures)
    assert tokens.shape == (2, (size // patch) ** 2, 32)
    expected = model.encode_image(pictures)["penultimate_hidden_states"]
    assert expected.shape[1] == tokens.shape[1] + before
    torch.testing.assert_close(tokens, expected[:, before:], rtol=1e-3, atol=1e-3)
    wide = vision_tokens(model, torch.rand(1, 40, 90, 3, generator=generator))
    assert wide.shape == tokens[:1].shape and torch.isfinite(wide).all()
    assert structure_distance(tokens, tokens).max() == 0 and structure_distance(tokens, wide).min() > 0


def test_an_image_text_model_comes_back_from_the_compute_device(comfy_subject: Any) -> None:
    pytest.importorskip("open_clip")
    import comfy.model_management

    from retrace.hosts.comfyui.image_text import on_compute_device
    from retrace.models.clip.model import load_image_text_model

    clip = load_image_text_model()
    with on_compute_device(clip) as working:
        assert working.device == comfy.model_management.get_torch_device()
        assert working.encode_images(torch.rand(1, 64, 64, 3)).shape == (1, 64)
    assert clip.device.type == "cpu"
