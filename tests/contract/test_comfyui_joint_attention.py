"""Reference KV in transformers with a joint attention: tiny models of core's own classes, random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.core.errors import RetraceError, UnsupportedModel

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 12,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 12, "hidden_size": 32,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 1, "txt_ids_dims": [],
    "vec_in_dim": None,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "pos_embed_scaling_factor": None, "depth": 2, "num_blocks": 4, "input_size": None,
    "patch_size": 2, "adm_in_channels": 8, "qk_norm": "rms", "pos_embed_max_size": 24, "num_patches": 576,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128}},
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6), "in_channels": 64, "out_channels": 16, "patch_size": 2,
}  # fmt: skip
SD35_MEDIUM = SD3 | {"x_block_self_attn_layers": [0, 1, 2]}  # these blocks also have an attention of the picture alone
PICTURE, TEXT = 24, 5  # tokens
KINDS: dict[str, Mapping[str, object]] = {
    "Flux": FLUX,
    "Chroma": CHROMA,
    "SD3": SD3,
    "SD3.5 medium": SD35_MEDIUM,
    "QwenImage": QWEN,
}


def tiny(kind: str) -> Any:
    """A MODEL with weights from a seed."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    name = kind.split(".")[0]
    described = dict(KINDS[kind])
    if name in ("Flux", "Chroma"):  # the fields differ from version to version; new ones have defaults
        import comfy.ldm.chroma.model
        import comfy.ldm.flux.model

        fields = {"Flux": comfy.ldm.flux.model.FluxParams, "Chroma": comfy.ldm.chroma.model.ChromaParams}[name]
        known = {field.name for field in dataclasses.fields(fields)} | {"image_model"}
        described = {key: value for key, value in described.items() if key in known}
    config = getattr(comfy.supported_models, name)({**described, "dtype": torch.float32})
    model = getattr(comfy.model_base, name)(config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if getattr(model.diffusion_model, "pos_embed", None) is not None:
        model.diffusion_model.pos_embed.normal_(generator=generator)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def condition(tokens: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, 12, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, 8, generator=generator), "guidance": 3.5}]]


def sample(model: Any, batch: int = 2, tokens: tuple[int, int] = (5, 5), **changes: Any) -> Tensor:
    import comfy.sample

    latents = model.model.latent_format
    frames = (1,) if latents.latent_dimensions == 3 else ()
    shape = (batch, latents.latent_channels, *frames, 8, 12)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    arguments = {"steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "seed": 1, **changes}
    out: Tensor = comfy.sample.sample(
        model, noise, positive=condition(tokens[0], 1), negative=condition(tokens[1], 2),
        latent_image=torch.zeros_like(noise), disable_pbar=True, **arguments,
    )  # fmt: skip
    return out


def with_attention(model: Any, attend: Callable[..., Tensor]) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attend
    return clone


def patch(model: Any, *arguments: Any, **options: Any) -> Any:
    from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

    return patch_reference_kv(model, *arguments, **options)


def blocks(model: Any) -> int:
    from retrace.hosts.comfyui.network.joint_attention import joint_blocks

    return len(joint_blocks(model.model.diffusion_model))


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, comfy_subject: Any) -> Any:
    return tiny(request.param)


def test_the_picture_is_read_from_the_reference_and_the_text_from_the_own_row(model: Any) -> None:
    """Against attention computed by hand; each pass runs two conditions of two pictures."""
    first, count, joint_calls = 1, blocks(model), 0

    def by_hand(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal joint_calls
        split = bool(kwargs.get("skip_reshape"))
        text = k.shape[2 if split else 1] - PICTURE
        assert text in (0, TEXT)  # 0: the second attention in blocks of SD3.5 medium
        joint_calls += text > 0
        if (joint_calls - 1) % count < first:
            return function(q, k, v, heads, *args, **kwargs)  # type: ignore[no-any-return]
        if not split:
            q, k, v = (t.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = torch.empty_like(q)
        for row, reference in enumerate([0, 0, 2, 2]):
            keys, values = (torch.cat([t[row, :, :text], t[reference, :, text:]], 1) for t in (k, v))
            out[row] = (q[row] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ values
        return out.transpose(1, 2).flatten(2)

    plain, expected, found = (sample(m) for m in (model, with_attention(model, by_hand), patch(model, first)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], plain[0]), "the reference is what it is without edits"
    assert float((found - plain)[1].abs().max()) > 0.05


def test_the_second_half_is_the_default(model: Any) -> None:
    from retrace.hosts.comfyui.patches.reference_kv import first_layer_of

    assert first_layer_of(model.model.diffusion_model) == blocks(model) // 2 == 2
    with pytest.raises(RetraceError, match=rf"this model has {blocks(model)} self-attention layers"):
        patch(model, blocks(model))


@pytest.mark.parametrize("kind", ["Flux", "SD3"])
def test_conditions_apart_and_edits_alone(comfy_subject: Any, kind: str) -> None:
    """Texts of unequal length run one after the other; an edit does not notice how many others there are."""
    model = tiny(kind)
    three, one = (sample(patch(model), batch, tokens=(5, 7)) for batch in (4, 2))
    torch.testing.assert_close(one, three[:2], rtol=1e-4, atol=1e-3)
    assert torch.equal(one[0], sample(model, tokens=(5, 7))[0])


def test_outside_its_window_nothing_happens(comfy_subject: Any) -> None:
    model = tiny("Flux")
    assert torch.equal(sample(patch(model, start_percent=0.999)), sample(model))


def test_replacements_of_other_packs_stay(comfy_subject: Any) -> None:
    """Of a block and of the attention function; both before this node and behind it."""
    seen: list[Tensor] = []

    def others(model: Any) -> Any:
        def attend(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(k)
            return function(q, k, v, *args, **kwargs)  # type: ignore[no-any-return]

        def block(args: Any, extra: Any) -> Any:
            out = extra["original_block"](args)
            return {**out, "img": 0.5 * out["img"]}

        clone = with_attention(model, attend)
        clone.set_model_patch_replace(block, "dit", "double_block", 1)
        clone.set_model_patch_replace(block, "dit", "single_block", 0)
        return clone

    model = tiny("Flux")
    before = sample(patch(others(model), 0))
    controlled = seen[0]  # double block 0, two conditions of two pictures
    assert torch.equal(controlled[0, :, TEXT:], controlled[1, :, TEXT:])
    assert torch.equal(sample(others(patch(model, 0))), before)
    assert float((before - sample(patch(model, 0)))[0].abs().max()) > 0.05
    assert float((before - sample(others(model)))[1].abs().max()) > 0.05


def test_a_block_that_hides_its_attention_is_an_error(comfy_subject: Any) -> None:
    model = tiny("Flux")
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    with pytest.raises(UnsupportedModel, match=r"Block 1 of kind 'single_block'.*another node replaces it"):
        sample(patch(model))


def test_cut_tokens_are_an_error(comfy_subject: Any) -> None:
    model = tiny("Flux")

    def cut(args: Any, extra: Any) -> Any:
        return extra["original_block"]({**args, "img": args["img"][:, :-1], "pe": args["pe"][:, :, :-1]})

    model.set_model_patch_replace(cut, "dit", "single_block", 1)
    with pytest.raises(UnsupportedModel, match=r"4 x 28 tokens instead of 4 x 29"):
        sample(patch(model))


def test_a_single_picture_is_refused(comfy_subject: Any) -> None:
    with pytest.raises(RetraceError, match=r"batch of 1"):
        sample(patch(tiny("Flux")), batch=1)


def test_other_models_are_refused_by_name(comfy_subject: Any) -> None:
    """AuraFlow's network has the class name of SD3's, but another order of tokens and no block to replace."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    described = {"n_layers": 2, "n_double_layers": 1, "dim": 32, "n_heads": 2, "max_seq": 16, "cond_seq_dim": 12}
    config = comfy.supported_models.AuraFlow({**described, "in_channels": 4, "dtype": torch.float32})
    model = comfy.model_base.AuraFlow(config, device="cpu")
    assert type(model.diffusion_model).__name__ == "MMDiT"
    with pytest.raises(UnsupportedModel, match=r"'AuraFlow'.*Connect an SD1\.x.*Flux"):
        patch(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))
