"""Weights in ComfyUI: shared under autograd, patched by LoRAs and hooks, partly loaded, quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.errors import UnsupportedModel
from tests.rounding import assert_rounds_to


def plain(denoiser: Any, x: Any, conds: Any) -> Any:
    return denoiser.denoised(x, 1.5, conds[0])


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
    assert_rounds_to(hosts[0].run(x, conds, with_gradient, gradients=True), patched, comfy_subject.roundings)
    assert not torch.allclose(patched, before, atol=1e-3)
    assert torch.equal(base.run(x, conds, by_list), before)


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


def test_lora_hooks_on_conditions_have_gradients(comfy_subject: Any) -> None:
    import comfy.hooks
    import comfy.sd

    from retrace.hosts.comfyui import ComfyHost

    base = comfy_subject.host
    name = "lora_unet_input_blocks_1_1_proj_in"
    lora = {f"{name}.lora_up.weight": torch.randn(64, 2, 1, 1), f"{name}.lora_down.weight": torch.randn(2, 64, 1, 1)}
    plain_text = base.encode_text("a red circle")
    hooked_text = comfy.hooks.set_hooks_for_conditioning(plain_text, comfy.hooks.create_hook_lora(lora, 0.5, 0.0))
    baked = ComfyHost(comfy.sd.load_lora_for_models(base.model, None, lora, 0.5, 0)[0])

    def gradient(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            y = x.clone().requires_grad_()
            return torch.autograd.grad(denoiser.denoised(y, 1.5, conds["0"]).square().sum(), y)[0]

    x = torch.randn(1, 4, 16, 16)
    hooked = base.run(x, {"0": hooked_text}, gradient, gradients=True)
    expected = baked.run(x, {"0": plain_text}, gradient, gradients=True)
    assert_rounds_to(hooked, expected, 3 * comfy_subject.roundings)

    def both(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.differentiable():
            return denoiser.denoised_each(x, 1.5, list(conds.values()))

    with pytest.raises(UnsupportedModel, match="hooks"):
        base.run(x, {"0": hooked_text, "1": plain_text}, both, gradients=True)


def test_partly_loaded_models_give_the_same_gradients(comfy_subject: Any) -> None:
    """Half of the layers stay out of memory and are patched as they run, as on a small GPU."""
    from retrace.hosts.comfyui import ComfyHost

    base = comfy_subject.host
    model = base.model.clone()
    weights = {k: v for k, v in model.model_state_dict().items() if "diffusion_model." in k and v.ndim > 1}
    model.add_patches({key: ("diff", (torch.randn(weight.shape) * 0.02,)) for key, weight in weights.items()}, 0.5)
    host = ComfyHost(model)
    partly: list[int] = []

    def gradient(denoiser: Any, x: Any, conds: Any) -> Any:
        if partly:
            with torch.inference_mode():
                denoiser.patcher.unpatch_model(denoiser.device)
                denoiser.patcher.load(denoiser.device, lowvram_model_memory=2_000_000)
            functions = [m.weight_function for m in denoiser.model.modules() if hasattr(m, "weight_function")]
            partly.append(sum(len(f) > 1 for f in functions))
        with denoiser.differentiable():
            y = x.clone().requires_grad_()
            return torch.autograd.grad(denoiser.denoised(y, 1.5, conds["0"]).square().sum(), y)[0]

    x, conds = torch.randn(1, 4, 16, 16), {"0": base.encode_text("a red circle")}
    whole = host.run(x, conds, gradient, gradients=True)
    partly.append(0)
    assert_rounds_to(host.run(x, conds, gradient, gradients=True), whole, 3 * comfy_subject.roundings)
    assert partly[1] > 50


def test_core_is_told_that_autograd_runs(comfy_subject: Any) -> None:
    """Newer models have fused kernels without a backward, and look at this flag."""
    import comfy.model_management as management

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with pytest.raises(ZeroDivisionError), denoiser.differentiable():
            inside.append(getattr(management, "in_training", True))
            _ = 1 / 0

    inside: list[bool] = []
    comfy_subject.run(torch.randn(1, 4, 16, 16), method, gradients=True)
    assert inside == [True]
    assert not getattr(management, "in_training", False)
