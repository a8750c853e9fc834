"""What only the ComfyUI host has: its scales, the conditions of graphs, core's samplers and memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from retrace.errors import InvalidFile, UnsupportedModel


def plain(denoiser: Any, x: Any, conds: Any) -> Any:
    return denoiser.denoised(x, 1.5, conds[0])


def test_euler_by_hand_equals_core(comfy_subject: Any) -> None:
    import comfy.sample
    import comfy.samplers

    from retrace.host import guided

    host = comfy_subject.host
    positive, negative = host.encode_text("a red circle"), host.encode_text("")
    sigmas = host.sigmas("normal", 4)[1:]  # below the highest level core adds the noise as it is
    noise = torch.randn(2, 4, 16, 16)
    seen = []
    core = comfy.sample.sample_custom(
        host.model, noise, 5.0, comfy.samplers.sampler_object("euler"), sigmas, positive, negative,
        torch.zeros(2, 4, 16, 16), disable_pbar=True, callback=lambda step, x0, x, total: seen.append(x0),
    )  # fmt: skip

    def euler(denoiser: Any, x: Any, conds: Any) -> Any:
        estimates = []
        for now, following in itertools.pairwise(sigmas):
            estimates.append(guided(*denoiser.denoised_each(x, now, [conds["negative"], conds["positive"]]), 5.0))
            x = x + (x - estimates[-1]) / now * (following - now)
        return x, estimates

    x, estimates = host.run(noise * sigmas[0], {"positive": positive, "negative": negative}, euler)
    torch.testing.assert_close(estimates, [e.clone() for e in seen], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(host.from_model_scale(x), core, rtol=1e-4, atol=1e-3)


def test_scales_convert_and_leave_an_empty_latent_alone(comfy_subject: Any) -> None:
    import comfy.latent_formats

    from retrace.hosts.comfyui import ComfyHost

    model = comfy_subject.host.model.clone()
    model.add_object_patch("latent_format", comfy.latent_formats.SD15())
    host = ComfyHost(model, comfy_subject.host.clip)
    samples = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(host.to_model_scale(samples), samples * 0.18215)
    torch.testing.assert_close(host.from_model_scale(host.to_model_scale(samples)), samples)
    assert torch.equal(host.to_model_scale(torch.zeros(1, 4, 8, 8)), torch.zeros(1, 4, 8, 8))
    latent = host.run(samples, {"p": host.encode_text("x")}, lambda denoiser, x, conds: x)
    assert torch.equal(latent, samples), "run() takes and gives latents in the model's scale"


def test_joined_prompts_keep_their_own_embeddings(comfy_subject: Any) -> None:
    host = comfy_subject.host
    left, right = host.encode_text("a red circle"), host.encode_text("a blue square")
    area = [[right[0][0], {**right[0][1], "area": (16, 8, 0, 8), "strength": 1.0}]]

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        joined, alone = conds["joined"], conds["left"]
        changed = joined.with_embedding(alone.embedding * 0)
        counts = denoiser.evaluations
        estimate = denoiser.denoised(x, 2.0, joined)
        return (
            len(joined.entries),
            denoiser.evaluations - counts,
            torch.equal(joined.embedding, alone.embedding),
            [float(e["model_conds"]["c_crossattn"].cond.abs().sum()) > 0 for e in changed.entries],
            estimate,
            denoiser.denoised(x, 2.0, alone),
        )

    entries, evaluations, first, nonzero, estimate, alone = host.run(
        torch.randn(1, 4, 16, 16), {"joined": left + area, "left": left}, method
    )
    assert (entries, evaluations, first, nonzero) == (2, 2, True, [False, True])
    torch.testing.assert_close(estimate[..., :4], alone[..., :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(estimate[..., 8:], alone[..., 8:], atol=1e-3)


def test_a_wrapped_weight_is_the_weight(comfy_subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy: while autograd runs, every layer computes with the model's own storage."""
    from retrace.hosts.comfyui.gradients import OrdinaryWeight

    shared = []
    call = OrdinaryWeight.__call__

    def spy(self: Any, weight: Any) -> Any:
        result = call(self, weight)
        if torch.is_grad_enabled():
            own = getattr(self.module, self.parameter)
            shared.append(result.data_ptr() == own.data_ptr() and not result.is_inference())
        return result

    monkeypatch.setattr(OrdinaryWeight, "__call__", spy)

    def method(denoiser: Any, x: Any, conds: Any) -> None:
        with denoiser.differentiable():
            estimate = denoiser.denoised(x.clone().requires_grad_(), 1.5, conds[0])
            comfy_subject.host.decode_differentiable(estimate).sum().backward()

    comfy_subject.run(torch.randn(1, 4, 16, 16), method, gradients=True)
    assert len(shared) > 300
    assert all(shared)


def test_a_weight_that_could_be_overwritten_is_copied(comfy_subject: Any) -> None:
    """Partly loaded models patch and cast weights on the fly, into buffers that the next layer reuses."""
    from retrace.hosts.comfyui.gradients import OrdinaryWeight

    layer: Any = torch.nn.Linear(2, 2)
    wrapper = OrdinaryWeight(layer, "weight")
    buffer = torch.zeros(2, 2)
    layer.weight_function = [wrapper]
    with torch.enable_grad():
        assert wrapper(buffer).data_ptr() == layer.weight.data_ptr()
        layer.weight_function = [lambda weight: weight, wrapper]  # a LoRA applied during the forward pass
        assert wrapper(buffer).data_ptr() not in (layer.weight.data_ptr(), buffer.data_ptr())
        layer.weight_function = [wrapper]
        half = wrapper(buffer.half())  # computed in another type than stored
        assert half.dtype == torch.float16 and not half.requires_grad
        layer._v = object()  # dynamic VRAM
        assert wrapper(buffer).data_ptr() not in (layer.weight.data_ptr(), buffer.data_ptr())


def test_quantised_weights_are_refused(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui.gradients import gradient_clone

    class QuantizedTensor(torch.nn.Parameter):
        pass

    class Patcher:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))

        def clone(self) -> Any:
            return self

    layer: Any = Patcher.model[0]
    layer.weight_function = []
    layer._parameters["weight"] = QuantizedTensor(torch.zeros(2, 2))
    with pytest.raises(UnsupportedModel, match="quantised"):
        gradient_clone(Patcher())


def test_loras_count_for_output_gradients_and_fingerprint(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui import ComfyHost

    base = comfy_subject.host
    weights = {k: v for k, v in base.model.model_state_dict().items() if "diffusion_model." in k and v.ndim > 1}
    patches = {key: ("diff", (torch.randn(weight.shape) * 0.02,)) for key, weight in weights.items()}
    hosts = []
    for strength in (0.5, 0.6):
        model = base.model.clone()
        assert len(model.add_patches(patches, strength)) == len(weights)
        hosts.append(ComfyHost(model, base.clip))
    assert len({base.fingerprint(), *(host.fingerprint() for host in hosts)}) == 3
    x, conds = torch.randn(1, 4, 16, 16), {"0": base.encode_text("a red circle")}

    def by_list(denoiser: Any, x: Any, prepared: Any) -> Any:
        return plain(denoiser, x, [prepared["0"]])

    def with_gradient(denoiser: Any, x: Any, prepared: Any) -> Any:
        with denoiser.differentiable():
            return by_list(denoiser, x.clone().requires_grad_(), prepared)

    before, printed = base.run(x, conds, by_list), hosts[0].fingerprint()
    patched = hosts[0].run(x, conds, by_list)
    assert hosts[0].fingerprint() == printed, "loading the model bakes the LoRA into the weights"
    assert base.fingerprint() not in (printed,)
    torch.testing.assert_close(hosts[0].run(x, conds, with_gradient, gradients=True), patched, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(patched, before, atol=1e-3)
    assert torch.equal(base.run(x, conds, by_list), before)


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
    torch.testing.assert_close(host.run(x, conds, hooked), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, base.run(x, conds, bare), atol=1e-4)


def test_patched_attention_serves_core_samplers(comfy_subject: Any) -> None:
    import comfy.sample

    from retrace.hosts.comfyui.attention import patch_attention

    host = comfy_subject.host
    rows = []

    def hook(call: Any, q: Any, k: Any, v: Any) -> Any:
        rows.append({row.cond for row in call.rows})
        return call.attend(q, k, v)

    arguments = (torch.randn(1, 4, 16, 16), 2, 5.0, "euler", "normal")
    conds = (host.encode_text("a red circle"), host.encode_text(""), torch.zeros(1, 4, 16, 16))
    plain = comfy.sample.sample(host.model, *arguments, *conds, seed=1, disable_pbar=True)
    hooked = comfy.sample.sample(patch_attention(host.model, hook), *arguments, *conds, seed=1, disable_pbar=True)
    assert set.union(*rows) == {0, 1}
    torch.testing.assert_close(hooked, plain, rtol=1e-5, atol=1e-4)
    again = comfy.sample.sample(host.model, *arguments, *conds, seed=1, disable_pbar=True)
    assert torch.equal(again, plain), "the model itself was not changed"


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


def test_a_controlnet_counts_as_constant(comfy_subject: Any) -> None:
    from retrace.hosts.comfyui.gradients import ConstantControl

    class Control:
        strength = 0.5

        def get_control(self, x: Any, *args: Any) -> Any:
            assert torch.is_inference_mode_enabled() and not x.requires_grad
            return {"input": [], "middle": [x * 2], "output": [None]}

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(1, 4, 2, 2, requires_grad=True)
        control = ConstantControl(Control())
        out = control.get_control(x, None)
    assert control.strength == 0.5
    assert not out["middle"][0].is_inference() and not out["middle"][0].requires_grad
    assert torch.equal(out["middle"][0], x.detach() * 2)


def test_a_missing_weight_file_is_named(comfy_subject: Any, tmp_path: Any) -> None:
    from retrace.hosts.comfyui import load_pebble

    with pytest.raises(InvalidFile, match=r"config\.json is missing"):
        load_pebble(tmp_path)
