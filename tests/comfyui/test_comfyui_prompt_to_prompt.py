"""Prompt-to-Prompt, Direct Inversion, Proximal Guidance and Attention Mask in the real ComfyUI."""

from __future__ import annotations

import copy
from typing import Any

import graphs
import pytest
import torch

from retrace import prompt_to_prompt as library
from tools.comfyui.server import ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")
SOURCE, TARGET = "a red circle on sand", "a blue circle on sand"


def p2p(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["pebble", 0],
        "clip": ["pebble", 1],
        "latent": ["invert", 0],
        "source": SOURCE,
        "targets": TARGET,
        "mode": "replace",
        "cross_replace": 0.8,
        "self_replace": 0.4,
        "word_weights": "",
        "blend_words": "",
        "keep_words": "",
        "blend_threshold": 0.3,
        "blend_start": 0.2,
        "word_windows": "",
        "self_limit": 32,
        "parity": False,
    }
    return graphs.node("RetracePromptToPrompt", **{**inputs, **changes})


def edit(model: str = "direct", **changes: Any) -> graphs.Graph:
    """Invert, plan the edit, hold the source, sample; the source's words are those of the inversion."""
    graph = graphs.base() | {"invert": graphs.inverter(), "p2p": p2p(**changes)}
    graph["caption"] = graphs.node("CLIPTextEncode", text=SOURCE, clip=["pebble", 1])
    graph["direct"] = graphs.node("RetraceDirectInversion", model=["p2p", 0], trajectory=["invert", 1])
    graph["sample"] = graphs.retracing_sampler(model=[model, 0], cfg=7.5, positive=["p2p", 1], latent_image=["p2p", 2])
    return graph | {"save": graphs.save("encode"), "save_sample": graphs.save("sample")}


def run(server: ComfyServer, graph: graphs.Graph) -> tuple[torch.Tensor, torch.Tensor]:
    """The source latent and the sampled batch."""
    result = server.run(graph)
    return graphs.latent(server, result, "save"), graphs.latent(server, result, "save_sample")


def test_the_source_comes_back_and_the_target_does_not(server: ComfyServer) -> None:
    source, batch = run(server, edit(blend_words="circle"))
    assert batch.shape[0] == 2
    torch.testing.assert_close(batch[:1], source, rtol=1e-4, atol=1e-4)
    assert float((batch[1] - batch[0]).abs().mean()) > 0.01


def along_the_grid(**changes: Any) -> graphs.Graph:
    """The edit along the grid of the paper's code, which closes with a step from the lowest level to itself."""
    graph = edit(**changes)
    graph["grid"] = graphs.node(
        "RetraceReferenceSchedule", model=["pebble", 0], grid="leading_0", steps=graphs.STEPS, parity=True
    )
    graph["invert"]["inputs"]["sigmas"] = ["grid", 0]
    graph["euler"] = graphs.node("KSamplerSelect", sampler_name="euler")
    graph["sample"] = graphs.node(
        "SamplerCustom", model=["direct", 0], add_noise=False, noise_seed=1, cfg=7.5, positive=["p2p", 1],
        negative=["empty", 0], sampler=["euler", 0], sigmas=["invert", 2], latent_image=["p2p", 2],
    )  # fmt: skip
    return graph


def by_library(
    source: torch.Tensor, settings: library.PlanSettings, asked: library.BlendWords, grid: bool = False
) -> torch.Tensor:
    """The batch that :func:`retrace.prompt_to_prompt.sample_edit` gives on the diffusers host."""
    from retrace.core.host import from_variance_preserving
    from retrace.core.schedule import reference_sigmas
    from retrace.hosts.diffusers import DiffusersHost
    from retrace.inversion.invert import invert

    host = DiffusersHost.load(None, device="cpu")
    sigmas = host.sigmas("normal", graphs.STEPS)
    if grid:
        sigmas = reference_sigmas("leading_0", host.training_sigmas(), graphs.STEPS)
    prompts = host.read_prompts([SOURCE, TARGET])
    plan = library.plan(prompts[0], prompts[1:], settings, library.local_blend(prompts, asked))
    conds = {
        "source": host.encode_text(SOURCE),
        "all": host.encode_text([SOURCE, TARGET]),
        "empty": host.encode_text(""),
    }
    scale = float(host.vae.config.scaling_factor)

    def method(model: Any, x: Any, c: Any) -> Any:
        start = from_variance_preserving(x, float(sigmas[-1]), host.parametrisation)
        path = invert(model, start, sigmas, c["source"])
        options = library.EditSampling(plan, source=path)
        return library.sample_edit(model, path.noise, sigmas, c["all"], c["empty"], 7.5, options)

    sampled: torch.Tensor = host.run(source * scale, conds, method)
    return sampled / scale


def test_it_is_the_edit_of_the_library(newest_server: ComfyServer) -> None:
    """Core's sampler with the patches, against the library's own loop."""
    source, batch = run(newest_server, edit(blend_words="circle"))
    expected = by_library(source, library.PlanSettings(), library.BlendWords(["circle"]))
    torch.testing.assert_close(batch, expected, rtol=1e-3, atol=1e-3)


def test_a_closing_step_between_equal_levels_blends(newest_server: ComfyServer) -> None:
    """As in the paper's code: the network is asked once more, and its maps count."""
    source, batch = run(newest_server, along_the_grid(blend_words="circle"))
    expected = by_library(source, library.PlanSettings(), library.BlendWords(["circle"]), grid=True)
    torch.testing.assert_close(batch, expected, rtol=1e-3, atol=1e-3)


def test_later_windows_and_words_per_prompt(newest_server: ComfyServer) -> None:
    given: dict[str, Any] = {"blend_words": "sand | circle, blue", "blend_threshold": 0.5}
    given |= {"cross_start": 0.25, "self_start": 0.5, "self_replace": 1.0}
    source, batch = run(newest_server, edit(**given))
    settings = library.PlanSettings(cross_replace=(0.25, 0.8), self_replace=(0.5, 1.0))
    asked = library.BlendWords([["sand"], ["circle", "blue"]], threshold=0.5)
    torch.testing.assert_close(batch, by_library(source, settings, asked), rtol=1e-3, atol=1e-3)
    for left_out in ("cross_start", "self_start"):
        _, other = run(newest_server, edit(**{name: value for name, value in given.items() if name != left_out}))
        assert float((other[1] - batch[1]).abs().max()) > 1e-2, left_out
    _, other = run(newest_server, edit(**{**given, "blend_words": "circle | circle, blue"}))
    assert float((other[1] - batch[1]).abs().max()) > 1e-2, "the words of the source"


def test_a_threshold_to_keep_of_its_own(newest_server: ComfyServer) -> None:
    given: dict[str, Any] = {"blend_words": "circle", "keep_words": "red", "blend_threshold": 0.3}
    own: list[dict[str, Any]] = [{"keep_threshold": 0.3}, {}, {"keep_threshold": 0.9}]
    (_, same), (_, plain), (_, high) = (run(newest_server, edit(**given, **one)) for one in own)
    assert torch.equal(same, plain)
    assert float((high[1] - plain[1]).abs().max()) > 1e-2


def test_one_batch_or_condition_after_condition(newest_server: ComfyServer) -> None:
    """The negative in a call of its own, as core does where memory is short or conditions differ: the same picture."""
    _, together = run(newest_server, edit())
    graph = edit()
    # A longer negative cannot share a batch with the positive.
    graph["empty"]["inputs"]["text"] = ""
    graph["long"] = graphs.node("ConditioningConcat", conditioning_to=["empty", 0], conditioning_from=["empty", 0])
    graph["sample"]["inputs"]["negative"] = ["long", 0]
    _, apart = run(newest_server, graph)
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


def test_fresh_pictures_start_from_one_noise(server: ComfyServer) -> None:
    graph = edit("p2p", latent=["blank", 0], targets=f"{SOURCE}\n{TARGET}", cross_replace=1.0, self_replace=1.0)
    graph["blank"] = graphs.node("EmptyLatentImage", width=128, height=128, batch_size=1)
    graph["sample"]["inputs"] |= {"add_noise": "enable"}
    _, batch = run(server, graph)
    torch.testing.assert_close(batch[1], batch[0], rtol=1e-3, atol=1e-3)
    assert float((batch[2] - batch[0]).abs().mean()) > 0.01


def test_changing_words_neither_inverts_again_nor_loads(newest_server: ComfyServer) -> None:
    newest_server.run(edit())
    again = newest_server.run(edit(targets="a green circle on sand"))
    assert {"invert", "encode", "pebble"}.isdisjoint(again.executed_nodes)


def test_proximal_guidance_changes_less(server: ComfyServer) -> None:
    graph = edit("proximal")
    graph["proximal"] = graphs.node("RetraceProximalGuidance", model=["p2p", 0], quantile=0.9, kind="hard")
    graph["sample"]["inputs"]["negative"] = ["caption", 0]
    source, near = run(server, graph)
    graph["proximal"]["inputs"]["quantile"] = 0.0
    _, far = run(server, graph)
    error = [float((batch[1] - source[0]).square().mean()) for batch in (near, far)]
    assert error[0] < error[1]


def test_proximal_guidance_is_no_guidance_at_cfg_1(newest_server: ComfyServer) -> None:
    graph = edit("proximal")
    graph["proximal"] = graphs.node("RetraceProximalGuidance", model=["p2p", 0], quantile=0.9, kind="hard")
    graph["sample"]["inputs"]["cfg"] = 1.0
    _, with_it = run(newest_server, graph)
    graph["sample"]["inputs"]["model"] = ["p2p", 0]
    _, without = run(newest_server, graph)
    assert torch.equal(with_it, without)


def test_a_word_becomes_a_mask(server: ComfyServer) -> None:
    graph = edit()
    graph["words"] = graphs.node(
        "RetraceAttentionMask", model=["pebble", 0], clip=["pebble", 1], trajectory=["invert", 1], prompt=SOURCE,
        words="circle", threshold=0.5, levels=2,
    )  # fmt: skip
    graph["picture"] = graphs.node("PreviewImage", images=["words", 1])
    graph["blend"] = graphs.blend(mask=["words", 0])
    graph["sample"] = graphs.sampler("blend")
    result = server.run(graph)
    assert "circle: mean" in result.text_of("words") and len(result.images_of("picture")) == 1
    graph["words"]["inputs"]["words"] = "dog"
    graphs.fails(server, graph, "RetraceAttentionMask", "Attention Mask", "'dog' is not in the prompt", "'circle'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ""}, ["at least one target"]),
        ({"blend_words": "dog"}, ["'dog' is not in the prompt", "'circle'"]),
        ({"blend_words": "circle | circle | red"}, ["words for 3 prompts", "there are 2"]),
        ({"word_weights": "red"}, ["word_weights: 'red' cannot be read"]),
        ({"word_weights": "dog: 2"}, ["'dog' is not in the prompt"]),
        ({"targets": "a circle", "parity": True}, ["has 5 words", "has 2", "parity"]),
    ],
)
def test_what_cannot_be_is_said(newest_server: ComfyServer, changes: dict[str, Any], words: list[str]) -> None:
    graphs.fails(newest_server, edit(**changes), "RetracePromptToPrompt", "Prompt-to-Prompt", *words)


def test_the_sampler_needs_its_latent_and_its_positive(newest_server: ComfyServer) -> None:
    graph = edit("p2p")
    graph["sample"]["inputs"]["latent_image"] = ["invert", 0]
    graphs.fails(newest_server, graph, "KSamplerAdvanced", "has 2 prompts", "batch of 1", "LATENT output")
    graph = edit("p2p")
    graph["sample"]["inputs"]["positive"] = ["caption", 0]
    words = ("Prompt-to-Prompt: the sampler's positive is another conditioning", "'positive' output")
    graphs.fails(newest_server, graph, "KSamplerAdvanced", *words)


def test_guiders_with_other_orders_edit_the_positive(newest_server: ComfyServer) -> None:
    """DualCFGGuider evaluates the negative first; with both cfgs alike it is plain guidance."""
    graph = edit("p2p")
    parts = {
        "noise": graphs.node("DisableNoise"),
        "ksampler": graphs.node("KSamplerSelect", sampler_name="euler"),
        "cfg": graphs.node("CFGGuider", model=["p2p", 0], positive=["p2p", 1], negative=["empty", 0], cfg=4.0),
        "dual": graphs.node(
            "DualCFGGuider", model=["p2p", 0], cond1=["p2p", 1], cond2=["p2p", 1], negative=["empty", 0],
            cfg_conds=4.0, cfg_cond2_negative=4.0, style="regular",
        ),
    }  # fmt: skip
    graph |= parts
    for name in ("cfg", "dual"):
        graph[f"sample_{name}"] = graphs.node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=[name, 0], sampler=["ksampler", 0],
            sigmas=["invert", 2], latent_image=["p2p", 2],
        )  # fmt: skip
        graph[f"save_{name}"] = graphs.save(f"sample_{name}")
    result = newest_server.run(graph)
    plain, dual = (graphs.latent(newest_server, result, f"save_{name}") for name in ("cfg", "dual"))
    torch.testing.assert_close(dual, plain, rtol=1e-3, atol=1e-3)


def test_a_latent_out_of_a_batch_keeps_its_noise(newest_server: ComfyServer) -> None:
    graph = edit("p2p", latent=["second", 0], cross_replace=1.0, self_replace=1.0)
    graph["blank"] = graphs.node("EmptyLatentImage", width=128, height=128, batch_size=2)
    graph["second"] = graphs.node("LatentFromBatch", samples=["blank", 0], batch_index=1, length=1)
    graph["sample"]["inputs"] |= {"add_noise": "enable"}
    graph["alone"] = copy.deepcopy(graph["sample"])
    graph["alone"]["inputs"] |= {"model": ["pebble", 0], "positive": ["caption", 0], "latent_image": ["second", 0]}
    graph["save_alone"] = graphs.save("alone")
    result = newest_server.run(graph)
    batch, alone = (graphs.latent(newest_server, result, f"save_{name}") for name in ("sample", "alone"))
    torch.testing.assert_close(batch[:1], alone, rtol=1e-3, atol=1e-3)


def test_direct_inversion_needs_one_picture_of_that_size(newest_server: ComfyServer) -> None:
    graph = edit()
    graph["two"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)
    graph["invert"]["inputs"]["latent"] = ["two", 0]
    graph["p2p"]["inputs"]["latent"] = ["encode", 0]
    graphs.fails(newest_server, graph, "RetraceDirectInversion", "Direct Inversion", "holds 2 images")
    graph = edit(latent=["blank", 0])
    graph["blank"] = graphs.node("EmptyLatentImage", width=64, height=128, batch_size=1)
    graphs.fails(newest_server, graph, "KSamplerAdvanced", "Direct Inversion", "[4, 16, 16]", "[4, 16, 8]")
    graph = edit()
    graph["p2p"]["inputs"]["latent"] = ["two", 0]
    graph["two"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)
    graphs.fails(newest_server, graph, "RetracePromptToPrompt", "Prompt-to-Prompt", "batch of 2", "Latent From Batch")
