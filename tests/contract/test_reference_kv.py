"""Reference KV on Pebble, in every host: the edit reads the reference, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.attention.reference_kv import ReferenceKV, default_first_layer
from retrace.core.errors import RetraceError
from retrace.core.host import AttentionCall
from tests.rounding import assert_rounds_to

pytestmark = pytest.mark.rounding

FIRST = 3  # of Pebble's seven layers: down.0, down.1, mid.0, up.0 twice, up.1 twice
PROMPTS = ("a red circle", "")


def passing(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return call.attend(q, k, v)


def estimates(subject: Any, x: Tensor, hook: Any, *prompts: str, sigma: float = 2.0) -> Tensor:
    """Clean estimates ``[conditions, B, C, h, w]`` of the network under ``hook``."""

    def method(denoiser: Any, x: Tensor, conds: Any) -> Tensor:
        with denoiser.attention(hook):
            return torch.stack(denoiser.denoised_each(x, sigma, conds))

    found: Tensor = subject.run(x, method, *(prompts or PROMPTS))
    return found


def test_an_edit_attends_to_the_reference(subject: Any) -> None:
    def by_hand(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call.attend(q, k, v).clone()
        if call.kind == "self" and call.index >= FIRST:
            for number, row in enumerate(call.rows):
                (reference,) = (n for n, other in enumerate(call.rows) if (other.cond, other.image) == (row.cond, 0))
                weights = (q[number] @ k[reference].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
                out[number] = weights @ v[reference]
        return out

    x = torch.randn(3, 4, 16, 24)
    found = estimates(subject, x, ReferenceKV(FIRST))
    assert_rounds_to(found, estimates(subject, x, by_hand), subject.roundings)
    plain = estimates(subject, x, passing)
    assert torch.equal(found[:, 0], plain[:, 0]), "the reference is what it is without edits"
    assert all(float((found[:, n] - plain[:, n]).abs().max()) > 1e-2 for n in (1, 2))


def test_an_edit_that_is_the_reference_does_not_change(subject: Any) -> None:
    x = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    found = estimates(subject, x, ReferenceKV(FIRST))
    assert_rounds_to(found, estimates(subject, x, passing), subject.roundings)
    assert_rounds_to(found[:, 1], found[:, 0], subject.roundings)


def test_the_order_of_the_conditions_does_not_matter(subject: Any) -> None:
    x = torch.randn(2, 4, 16, 16)
    forward = estimates(subject, x, ReferenceKV(FIRST), *PROMPTS)
    backward = estimates(subject, x, ReferenceKV(FIRST), *PROMPTS[::-1])
    assert_rounds_to(backward, forward.flip(0), subject.roundings)
    for number, prompt in enumerate(PROMPTS):
        alone = estimates(subject, x, ReferenceKV(FIRST), prompt)
        assert_rounds_to(alone[0], forward[number], subject.roundings)


def test_edits_do_not_see_each_other(subject: Any) -> None:
    x = torch.randn(4, 4, 16, 16)
    together = estimates(subject, x, ReferenceKV(FIRST))
    for edit in (1, 2, 3):
        pair = estimates(subject, x[[0, edit]], ReferenceKV(FIRST))
        assert_rounds_to(pair[:, 1], together[:, edit], subject.roundings)


def test_outside_its_window_nothing_happens(subject: Any) -> None:
    x, control = torch.randn(2, 4, 16, 16), ReferenceKV(FIRST, start=3.0, end=1.0)
    for sigma, active in ((4.0, False), (2.0, True), (0.5, False)):
        plain = estimates(subject, x, passing, sigma=sigma)
        assert torch.equal(estimates(subject, x, control, sigma=sigma), plain) is not active


def test_layers_count_from_the_first_to_the_last(subject: Any) -> None:
    controlled = []

    def hook(call: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ReferenceKV(FIRST, 5)(call, q, k, v)
        if not torch.equal(out, call.attend(q, k, v)):
            controlled.append((call.index, call.kind))
        return out

    estimates(subject, torch.randn(2, 4, 16, 16), hook, "a red circle")
    assert controlled == [(index, "self") for index in (3, 4, 5)]


def test_the_default_begins_with_the_decoder_of_pebble(subject: Any) -> None:
    if subject.name == "diffusers":
        from retrace.hosts.diffusers.attention import attention_blocks

        assert default_first_layer(attention_blocks(subject.host.unet)) == FIRST
    else:
        from retrace.hosts.comfyui.patches.reference_kv import first_layer_of

        assert first_layer_of(subject.host.model.model.diffusion_model) == FIRST


def test_a_single_image_is_refused(subject: Any) -> None:
    with pytest.raises(RetraceError, match=r"batch of 1.*\[reference, edit"):
        estimates(subject, torch.randn(1, 4, 16, 16), ReferenceKV(FIRST))


class TestCoreSamplers:
    """The patch of the node under ComfyUI's own samplers."""

    def sample(self, subject: Any, model: Any, batch: int = 2, **changes: Any) -> Tensor:
        import comfy.sample

        noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        host = subject.host
        conds = (host.encode_text("a red circle"), host.encode_text(""))
        arguments = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "seed": 1, **changes}
        out: Tensor = comfy.sample.sample(
            model, noise, positive=conds[0], negative=conds[1], latent_image=torch.zeros_like(noise),
            disable_pbar=True, **arguments,
        )  # fmt: skip
        return out

    def roundings(self, subject: Any) -> int:
        """Of four steps, each of two conditions, which guidance of 4 takes at 4 and 3 times their size."""
        return 4 * (4**2 + 3**2) * int(subject.roundings)

    def test_they_sample_what_the_hook_of_the_library_does(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.network.attention import install_attention
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        model = comfy_subject.host.model
        plain = self.sample(comfy_subject, model)
        found = self.sample(comfy_subject, patch_reference_kv(model))
        hooked = model.clone()
        install_attention(hooked.model_options, comfy_subject.host.network, ReferenceKV(FIRST))
        expected = self.sample(comfy_subject, hooked)
        assert torch.equal(found, expected)
        assert_rounds_to(found[0], plain[0], self.roundings(comfy_subject))
        assert float((found[1] - plain[1]).abs().max()) > 0.05
        assert torch.equal(self.sample(comfy_subject, model), plain), "the model itself was not changed"

    @pytest.mark.parametrize("cfg", [1.0, 4.0])
    def test_conditions_that_run_apart(self, comfy_subject: Any, cfg: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """As core does where memory is short: each condition in a pass of its own."""
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        patched = patch_reference_kv(comfy_subject.host.model)
        together = self.sample(comfy_subject, patched, batch=3, cfg=cfg)
        passes = []

        def apply(apply_model: Any, given: Any) -> Any:
            passes.append(list(given["cond_or_uncond"]))
            return apply_model(given["input"], given["timestep"], **given["c"])

        apart = patched.clone()
        apart.set_model_unet_function_wrapper(apply)
        monkeypatch.setattr(patched.model, "memory_required", lambda *_, **__: 1e30)
        found = self.sample(comfy_subject, apart, batch=3, cfg=cfg)
        assert sorted({tuple(conds) for conds in passes}) == ([(0,)] if cfg == 1 else [(0,), (1,)])
        assert_rounds_to(found, together, self.roundings(comfy_subject))

    def test_the_window_is_counted_in_percent(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        model, levels = comfy_subject.host.model, []

        def note(apply_model: Any, given: Any) -> Any:
            levels.append(float(given["timestep"][0]))
            return apply_model(given["input"], given["timestep"], **given["c"])

        watched = model.clone()
        watched.set_model_unet_function_wrapper(note)
        plain = self.sample(comfy_subject, watched)
        levels = sorted(set(levels), reverse=True)  # of the four steps
        sampling = model.get_model_object("model_sampling")
        assert float(sampling.percent_to_sigma(0.4)) < levels[1] and float(sampling.percent_to_sigma(0.6)) > levels[2]
        never = self.sample(comfy_subject, patch_reference_kv(model, start_percent=0.4, end_percent=0.6))
        assert_rounds_to(never, plain, self.roundings(comfy_subject))
        early, late = patch_reference_kv(model, end_percent=0.5), patch_reference_kv(model, start_percent=0.5)
        halves = [self.sample(comfy_subject, half) for half in (early, late)]
        whole = self.sample(comfy_subject, patch_reference_kv(model))
        both = self.sample(comfy_subject, patch_reference_kv(early, start_percent=0.5))
        assert torch.equal(both, whole)
        assert all(float((half - other)[1].abs().max()) > 1e-2 for half in halves for other in (plain, whole))

    def test_other_attention_patches_stay(self, comfy_subject: Any) -> None:
        """Another pack's replacement of a controlled layer gets the reference's keys, before or after this node."""
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        def weaker(q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
            from comfy.ldm.modules.attention import optimized_attention

            return 0.5 * optimized_attention(q, k, v, extra["n_heads"])  # type: ignore[no-any-return]

        def with_other(model: Any) -> Any:
            clone = model.clone()
            clone.set_model_attn1_replace(weaker, "output", 3)
            return clone

        model = comfy_subject.host.model
        before, after = (
            self.sample(comfy_subject, patched)
            for patched in (patch_reference_kv(with_other(model)), with_other(patch_reference_kv(model)))
        )
        assert torch.equal(before, after)
        for one in (with_other(model), patch_reference_kv(model)):
            assert float((self.sample(comfy_subject, one) - before)[1].abs().max()) > 1e-2

    def test_beside_prompt_to_prompt(self, comfy_subject: Any) -> None:
        """While maps of the source are taken over, an edit reads source values by them: its layers are the source's."""
        from retrace import prompt_to_prompt as p2p
        from retrace.hosts.comfyui.patches.prompt_to_prompt import patch_prompt_to_prompt
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv
        from retrace.hosts.comfyui.prompts import TokenisedPrompts

        host = comfy_subject.host
        texts = ["a red circle", "a blue circle"]
        prompts = host.read_prompts(texts)
        edit = p2p.plan(prompts[0], prompts[1:])
        positive, encode = TokenisedPrompts(host.clip, texts).encode(), host.encode_text
        host.encode_text = lambda text: positive if text else encode(text)
        try:
            edited, first, last = (
                self.sample(comfy_subject, model)
                for model in (
                    patch_prompt_to_prompt(host.model, edit),
                    patch_reference_kv(patch_prompt_to_prompt(host.model, edit)),
                    patch_prompt_to_prompt(patch_reference_kv(host.model), edit),
                )
            )
        finally:
            del host.encode_text
        assert_rounds_to(first, last, self.roundings(comfy_subject))
        assert_rounds_to(first[0], edited[0], self.roundings(comfy_subject))
        assert float((first - edited)[1].abs().max()) > 1e-2

    def test_a_single_image_is_refused(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        with pytest.raises(RetraceError, match=r"batch of 1.*Latent Batch"):
            self.sample(comfy_subject, patch_reference_kv(comfy_subject.host.model), batch=1)

    @pytest.mark.parametrize("first", [-1, 7])
    def test_layers_that_are_not_there(self, comfy_subject: Any, first: int) -> None:
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        with pytest.raises(RetraceError, match=rf"first_layer is {first}.*7 self-attention layers.*0 to 6"):
            patch_reference_kv(comfy_subject.host.model, first)

    def test_a_window_the_wrong_way_round(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.patches.reference_kv import patch_reference_kv

        with pytest.raises(RetraceError, match=r"starts at 0.5 but ends at 0.2"):
            patch_reference_kv(comfy_subject.host.model, start_percent=0.5, end_percent=0.2)
