"""Prompt-to-Prompt on both hosts: what it costs, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace import prompt_to_prompt as p2p
from retrace.inversion.invert import invert

pytestmark = pytest.mark.rounding

STEPS = 5
TEXTS = ["a red circle on sand", "a blue circle on sand"]


def edit(subject: Any, texts: list[str], blend: Any = None) -> tuple[torch.Tensor, int, Any]:
    """The latents of a Direct Inversion edit, the evaluations it took with its inversion, and the trajectory."""
    host = subject.host
    sigmas = host.sigmas("normal", STEPS)
    prompts = host.read_prompts(texts)
    planned = p2p.plan(prompts[0], prompts[1:], blend=blend)

    def method(model: Any, x: Any, conds: Any) -> Any:
        path = invert(model, x, sigmas, conds["source"])
        options = p2p.EditSampling(planned, source=path)
        latents = p2p.sample_edit(model, path.noise, sigmas, conds["all"], conds["empty"], 5.0, options)
        return latents, model.evaluations, path

    conds = {"source": host.encode_text(texts[0]), "all": host.encode_text(texts), "empty": host.encode_text("")}
    return host.run(torch.randn(1, 4, 16, 16), conds, method)  # type: ignore[no-any-return]


def test_words_stand_where_the_tokenizer_puts_them(subject: Any) -> None:
    short, long = subject.host.read_prompts(["A red circle, on sand", "a blue circle on " + "very " * 80 + "sand"])
    assert [word.text for word in short.words] == ["a", "red", "circle", ",", "on", "sand"]
    assert short.find("circle") == (3,) and short.length == long.length == 154
    assert long.find("sand")[0] > 77


def test_the_source_comes_back_and_costs_three_evaluations_a_step(subject: Any) -> None:
    """DDIM inversion and Direct Inversion with one target: N + 3 N, for the 50 steps of the paper 200 and not 450."""
    latents, evaluations, path = edit(subject, TEXTS)
    assert torch.equal(latents[:1], path.source)
    assert evaluations == STEPS + 3 * STEPS
    assert float((latents[1] - latents[0]).abs().mean()) > 0.01


def test_the_same_words_with_the_same_attention_differ_only_by_guidance(subject: Any) -> None:
    host = subject.host
    sigmas = host.sigmas("normal", STEPS)
    prompts = host.read_prompts([TEXTS[0], TEXTS[0]])
    settings = p2p.PlanSettings(cross_replace=(0.0, 1.0), self_replace=(0.0, 1.0))
    options = p2p.EditSampling(p2p.plan(prompts[0], prompts[1:], settings))
    conds = {"all": host.encode_text([TEXTS[0]] * 2), "empty": host.encode_text("")}
    noise = torch.randn(1, 4, 16, 16) * float(sigmas[0])

    def method(model: Any, x: Any, c: Any) -> Any:
        return p2p.sample_edit(model, x, sigmas, c["all"], c["empty"], 5.0, options)

    source, target = host.run(noise, conds, method)
    torch.testing.assert_close(target, source, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("texts", [[*TEXTS, "a blue square on sand", "a red circle"], ["a", "a " * 90]])
def test_several_targets_and_long_prompts(subject: Any, texts: list[str]) -> None:
    blend = p2p.local_blend(subject.host.read_prompts(texts), p2p.BlendWords([texts[0].split()[-1]]))
    latents, evaluations, path = edit(subject, texts, blend=blend)
    assert latents.shape == (len(texts), 4, 16, 16) and torch.isfinite(latents).all()
    assert evaluations == STEPS + (2 * len(texts) - 1) * STEPS
    assert torch.equal(latents[:1], path.source)


def test_other_sizes(subject: Any) -> None:
    host = subject.host
    sigmas = host.sigmas("normal", 2)
    prompts = host.read_prompts(TEXTS)
    planned = p2p.plan(prompts[0], prompts[1:], blend=p2p.local_blend(prompts, p2p.BlendWords(["circle"])))
    options = p2p.EditSampling(planned)
    conds = {"all": host.encode_text(TEXTS), "empty": host.encode_text("")}

    def method(model: Any, x: Any, c: Any) -> Any:
        return p2p.sample_edit(model, x, sigmas, c["all"], c["empty"], 5.0, options)

    assert host.run(torch.randn(1, 4, 12, 20), conds, method).shape == (2, 4, 12, 20)


class TestInsideComfyUI:
    """The patch under core's samplers."""

    @pytest.mark.parametrize("blend", [None, ["circle"]])
    def test_a_run_inside_a_run_of_the_same_model_disturbs_neither(self, comfy_subject: Any, blend: Any) -> None:
        """Steps, maps and conditions belong to a run: here the outer one stands still while the inner one runs."""
        import comfy.sample
        import comfy.samplers

        from retrace.hosts.comfyui.patches.prompt_to_prompt import edit_by_words

        host = comfy_subject.host
        asked = p2p.BlendWords(blend or [])
        edit = edit_by_words(host.model, host.clip, TEXTS, p2p.PlanSettings(self_replace=(0.0, 0.6)), asked)
        negative = host.encode_text("")

        def sampled(steps: int, seed: int, callback: Any = None) -> torch.Tensor:
            noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).repeat(2, 1, 1, 1)
            latent: torch.Tensor = comfy.sample.sample_custom(
                edit.model, noise, 5.0, comfy.samplers.sampler_object("euler"), host.sigmas("normal", steps),
                edit.positive, negative, torch.zeros_like(noise), callback=callback, disable_pbar=True,
            )  # fmt: skip
            return latent

        outer, inner = sampled(4, 1), sampled(3, 2)
        nested: list[torch.Tensor] = []

        def run_another(step: int, x0: Any, x: Any, total: int) -> None:
            if step in (0, 2):
                running = host.model.model.current_patcher  # which core forgets at the end of any run
                nested.append(sampled(3, 2))
                host.model.model.current_patcher = running

        assert torch.equal(sampled(4, 1, run_another), outer)
        assert len(nested) == 2 and all(torch.equal(one, inner) for one in nested)

    def test_a_run_that_fails_leaves_nothing_behind(self, comfy_subject: Any) -> None:
        import comfy.sample
        import comfy.samplers

        from retrace.hosts.comfyui.patches.prompt_to_prompt import edit_by_words

        host = comfy_subject.host
        edit = edit_by_words(host.model, host.clip, TEXTS, p2p.PlanSettings(), p2p.BlendWords(["circle"]))
        sigmas, noise = host.sigmas("normal", 3), torch.randn(2, 4, 16, 16)

        def sampled(callback: Any = None) -> torch.Tensor:
            latent: torch.Tensor = comfy.sample.sample_custom(
                edit.model, noise, 5.0, comfy.samplers.sampler_object("euler"), sigmas, edit.positive,
                host.encode_text(""), torch.zeros_like(noise), callback=callback, disable_pbar=True,
            )  # fmt: skip
            return latent

        def stop(step: int, x0: Any, x: Any, total: int) -> None:
            if step == 1:
                raise KeyboardInterrupt

        before = sampled()
        with pytest.raises(KeyboardInterrupt):
            sampled(stop)
        assert torch.equal(sampled(), before)


def test_the_map_of_a_word_is_a_picture_of_it(subject: Any) -> None:
    host = subject.host
    sigmas = host.sigmas("normal", STEPS)
    (read,) = host.read_prompts([TEXTS[0]])
    places = [read.find("circle"), read.find("sand")]

    def method(model: Any, x: Any, c: Any) -> Any:
        path = invert(model, x, sigmas, c["source"])
        before = model.evaluations
        return p2p.word_maps(model, path, c["source"], places, levels=3), model.evaluations - before

    maps, evaluations = host.run(torch.randn(2, 4, 16, 24), {"source": host.encode_text(TEXTS[0])}, method)
    assert maps.shape == (2, 2, 16, 24) and evaluations == 3 * 2
    assert float(maps.amin()) >= 0 and torch.allclose(maps.amax(dim=(2, 3)), torch.ones(2, 2))
    mask = p2p.word_mask(maps, (128, 192), 0.5)
    assert mask.shape == (2, 128, 192) and set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any()
