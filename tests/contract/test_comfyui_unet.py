"""Attention and blocks of ComfyUI's UNets: other packs' patches, core's samplers, the large models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.errors import UnsupportedModel
from tests.rounding import assert_rounds_to


def test_hooks_keep_the_patches_of_other_packs(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui import ComfyHost

    base = comfy_subject.host
    silenced = base.model.clone()
    silenced.set_model_attn2_replace(lambda q, k, v, extra: torch.zeros_like(q), "middle", 0)
    host = ComfyHost(silenced, base.clip)
    x, conds = torch.randn(1, 4, 16, 16), {"0": base.encode_text("a red circle")}

    def hooked(denoiser: Any, x: Any, prepared: Any) -> Any:
        with denoiser.attention(lambda call, q, k, v: call.attend(q, k, v)):
            return denoiser.denoised(x, 1.5, prepared["0"])

    def bare(denoiser: Any, x: Any, prepared: Any) -> Any:
        return denoiser.denoised(x, 1.5, prepared["0"])

    expected = host.run(x, conds, bare)
    assert_rounds_to(host.run(x, conds, hooked), expected, comfy_subject.roundings)
    assert not torch.allclose(expected, base.run(x, conds, bare), atol=1e-4)


def test_patched_attention_serves_core_samplers(comfy_subject: Any) -> None:
    import comfy.sample

    from retrace.hosts.comfyui.network.attention import install_attention

    host = comfy_subject.host
    rows = []

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        rows.append({row.cond for row in call.rows})
        return call.attend(q, k, v)

    arguments = (torch.randn(1, 4, 16, 16), 2, 5.0, "euler", "normal")
    conds = (host.encode_text("a red circle"), host.encode_text(""), torch.zeros(1, 4, 16, 16))
    plain = comfy.sample.sample(host.model, *arguments, *conds, seed=1, disable_pbar=True)
    patched = host.model.clone()
    install_attention(patched.model_options, host.network, hook)
    hooked = comfy.sample.sample(patched, *arguments, *conds, seed=1, disable_pbar=True)
    assert set.union(*rows) == {0, 1}
    assert_rounds_to(hooked, plain, 2 * (5**2 + 4**2) * comfy_subject.roundings)  # two steps at guidance 5
    again = comfy.sample.sample(host.model, *arguments, *conds, seed=1, disable_pbar=True)
    assert torch.equal(again, plain), "the model itself was not changed"


@pytest.mark.parametrize("key", [("middle", 0), ("middle", 0, 0)])
def test_prompt_to_prompt_keeps_patches_that_come_after_it(comfy_subject: Any, key: tuple[Any, ...]) -> None:
    """As IP-Adapter packs put them in, by block or by layer; before or after makes no difference."""
    import comfy.sample

    from retrace import prompt_to_prompt as p2p
    from retrace.hosts.comfyui.patches.prompt_to_prompt import patch_prompt_to_prompt
    from retrace.hosts.comfyui.prompts import TokenisedPrompts

    host = comfy_subject.host
    texts = ["a red circle", "a blue circle"]
    prompts = host.read_prompts(texts)
    edit = p2p.plan(prompts[0], prompts[1:])
    conds = (
        TokenisedPrompts(host.clip, texts).encode(),
        TokenisedPrompts(host.clip, [""]).encode(),
        torch.zeros(2, 4, 16, 16),
    )

    def silenced(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_replace(lambda q, k, v, extra: torch.zeros_like(q), *key)
        return clone

    def sampled(model: Any) -> torch.Tensor:
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        out: torch.Tensor = comfy.sample.sample(
            model, noise, 2, 5.0, "euler", "normal", *conds, seed=1, disable_pbar=True
        )
        return out

    after = sampled(silenced(patch_prompt_to_prompt(host.model, edit)))
    before = sampled(patch_prompt_to_prompt(silenced(host.model), edit))
    assert_rounds_to(after, before, 2 * (5**2 + 4**2) * comfy_subject.roundings)  # two steps at guidance 5
    assert not torch.allclose(after, sampled(patch_prompt_to_prompt(host.model, edit)), atol=1e-4)


def test_merged_tokens_are_refused(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui import ComfyHost

    base = comfy_subject.host
    merging = base.model.clone()
    merging.set_model_attn1_patch(lambda q, k, v, extra: (q[:, ::2], k, v))
    host = ComfyHost(merging, base.clip)

    def hooked(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.attention(lambda call, q, k, v: call.attend(q, k, v)):
            return denoiser.denoised(x, 1.5, conds["0"])

    with pytest.raises(UnsupportedModel, match="Token Merging"):
        host.run(torch.randn(1, 4, 16, 16), {"0": base.encode_text("x")}, hooked)


SD15 = {
    "context_dim": 768,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
}
SDXL = {
    "context_dim": 2048,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_head_channels": 64,
}


@pytest.mark.parametrize(
    ("config", "blocks", "channels"),
    [
        (
            SD15,
            {"down.0": 2, "down.1": 2, "down.2": 2, "mid.0": 1, "up.1": 3, "up.2": 3, "up.3": 3},
            {"up.0": 1280, "up.1": 1280, "up.2": 640, "up.3": 320, "mid.0": 1280},
        ),
        (
            SDXL,
            {"down.1": 4, "down.2": 20, "mid.0": 10, "up.0": 30, "up.1": 6},
            {"up.0": 1280, "up.1": 640, "up.2": 320, "mid.0": 1280},
        ),
    ],
    ids=["SD1.5", "SDXL"],
)
def test_large_unets_have_the_names_of_diffusers(
    comfy_subject: Any, config: dict[str, Any], blocks: dict[str, int], channels: dict[str, int]
) -> None:
    """Counts and widths from the configurations of the published diffusers models; the networks are empty shells."""
    from collections import Counter

    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from retrace.hosts.comfyui.network.unet import attention_layers, feature_layer

    network = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True, legacy=False,
        device="meta", operations=comfy.ops.disable_weight_init, **config,
    )  # fmt: skip
    layers = attention_layers(network)
    assert Counter(layer.block for layer in layers if layer.patch == "attn2") == blocks
    assert [layer.index for layer in layers] == [i for i in range(sum(blocks.values())) for _ in range(2)]
    for name, width in channels.items():
        layer: Any = feature_layer(network, name)
        assert (getattr(layer, "in_channels", None) or layer.out_channels) == width, name
