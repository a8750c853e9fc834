"""Adapters on the attention projections, and a LoRA trained through them, in both hosts and in core's own files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from retrace.attention.lora.result import PROBES
from retrace.attention.lora.settings import LoraTraining
from retrace.attention.lora.train import initial_adapters, train
from retrace.core.errors import RetraceError, UnsupportedModel
from retrace.core.host import LowRank
from tests.rounding import assert_rounds_to, assert_trained_alike, tolerance

pytestmark = pytest.mark.rounding

SIGMA = 1.5
SETTINGS = {"rank": 4, "steps": 2, "batch_size": 2}


def layers_of(subject: Any) -> dict[str, Any]:
    """The linear layers by the names of the protocol."""
    network = subject.networks()[0]
    if subject.name == "comfyui":
        from retrace.hosts.comfyui.network.lora import projection_layers as layers_in_comfyui

        return layers_in_comfyui(network)
    from retrace.hosts.diffusers.lora import projection_layers as layers_in_diffusers

    return layers_in_diffusers(network)


def random_adapters(shapes: dict[str, tuple[int, int]], seed: int = 0, size: float = 0.05) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator)

    return {name: LowRank(draw(4, inputs), draw(outputs, 4)) for name, (outputs, inputs) in shapes.items()}


def predictions(subject: Any, x: torch.Tensor, adapters: dict[str, LowRank] | None = None) -> Any:
    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        with denoiser.adapters(adapters or {}):
            return denoiser.denoised_each(x, SIGMA, conds)

    return torch.cat(subject.run(x, method, "a red circle", ""))


def trained(subject: Any, x: torch.Tensor, callback: Any = None, **settings: Any) -> Any:
    training = LoraTraining(**{**SETTINGS, **settings})

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        return train(denoiser, x, conds[0], subject.host.training_sigmas(), training, callback)

    return subject.run(x, method, gradients=True)


def gradients(subject: Any, x: torch.Tensor, adapters: dict[str, LowRank], recompute: bool = False) -> Any:
    """Of a sum over the clean estimate, by adapter."""

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        own = {
            name: LowRank(a.down.clone().requires_grad_(), a.up.clone().requires_grad_())
            for name, a in adapters.items()
        }
        with denoiser.differentiable(recompute=recompute), denoiser.adapters(own):
            denoiser.denoised(x, SIGMA, conds[0]).square().sum().backward()
        return {name: LowRank(_grad(a.down), _grad(a.up)) for name, a in own.items()}

    return subject.run(x, method, gradients=True)


def _grad(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad


def shapes_of(subject: Any) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = subject.run(
        torch.zeros(1, 4, 8, 8), lambda model, x, conds: model.projections()
    )
    return shapes


def test_names_lead_to_the_same_weights_in_every_host(subject: Any) -> None:
    """Against the file, which has the layout of diffusers."""
    from safetensors.torch import load_file

    file = load_file(subject.folder / "unet" / "diffusion_pytorch_model.safetensors")
    order = {"down": 0, "mid": 1, "up": 2}
    found: dict[tuple[int, ...], str] = {}
    for key in file:
        if ".attn1.to_q." in key:
            side, rest = key.split("_block", 1)
            numbers = [int(part) for part in rest.split(".attn1")[0].split(".") if part.isdigit()]
            numbers = numbers if side != "mid" else [0, *numbers]
            found[(order[side], *numbers)] = key.split("attn1")[0]
    layers, expected = layers_of(subject), {}
    for index, place in enumerate(sorted(found)):
        block = f"{('down', 'mid', 'up')[place[0]]}.{place[1]}"
        for attention in ("attn1", "attn2"):
            for letter in ("q", "k", "v", "out"):
                path = f"{found[place]}{attention}.to_{letter}{'.0' if letter == 'out' else ''}.weight"
                expected[f"{block}.{index}.{attention}.{letter}"] = file[path]
    assert list(layers) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(layers[name].weight.float(), weight.float()), name
    assert shapes_of(subject) == {name: tuple(weight.shape) for name, weight in expected.items()}


def test_new_adapters_change_no_bit(subject: Any) -> None:
    x = torch.randn(2, 4, 16, 16) * SIGMA
    adapters = initial_adapters(shapes_of(subject), 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(predictions(subject, x, adapters), predictions(subject, x))


def test_adapters_act_as_merged_weights_and_leave_no_trace(subject: Any) -> None:
    x = torch.randn(2, 4, 16, 16) * SIGMA
    adapters, plain = random_adapters(shapes_of(subject)), predictions(subject, x)
    adapted = predictions(subject, x, adapters)
    with merged(subject, adapters):
        assert_rounds_to(adapted, predictions(subject, x), subject.roundings)
    assert float((adapted - plain).abs().max()) > 0.01
    assert torch.equal(predictions(subject, x), plain)


@contextmanager
def merged(subject: Any, adapters: dict[str, LowRank]) -> Iterator[None]:
    """Inside, the weights themselves are changed."""
    layers = layers_of(subject)
    before = {name: layers[name].weight.clone() for name in adapters}
    try:
        for name, adapter in adapters.items():
            layers[name].weight.data += adapter.up @ adapter.down
        yield
    finally:
        for name, weight in before.items():
            layers[name].weight.data.copy_(weight)


def test_gradients_equal_finite_differences(subject: Any) -> None:
    x, adapters = torch.randn(1, 4, 16, 16), random_adapters(shapes_of(subject))
    found = gradients(subject, x, adapters)
    size = sum(float(g.down.double().square().sum() + g.up.double().square().sum()) for g in found.values()) ** 0.5

    def at(step: float) -> float:
        moved = {
            name: LowRank(a.down + step * found[name].down / size, a.up + step * found[name].up / size)
            for name, a in adapters.items()
        }

        def method(denoiser: Any, x: Any, conds: Any) -> Any:
            with denoiser.adapters(moved):
                return denoiser.denoised(x, SIGMA, conds[0])

        return float(subject.run(x, method).double().square().sum())

    step = 0.02
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(size, rel=0.02)


def test_recomputed_blocks_give_the_same_gradients(subject: Any) -> None:
    x, adapters = torch.randn(1, 4, 16, 16), random_adapters(shapes_of(subject))
    kept, again = (gradients(subject, x, adapters, recompute) for recompute in (False, True))
    for name in adapters:
        assert_rounds_to(again[name].down, kept[name].down, 3 * subject.roundings)
        assert_rounds_to(again[name].up, kept[name].up, 3 * subject.roundings)
    assert not any("forward" in vars(module) for module in subject.networks()[0].modules())


def test_recomputed_blocks_keep_less(subject: Any) -> None:
    """Tensors that wait for the backward pass, weights not counted."""
    x, adapters = torch.randn(1, 4, 16, 16), random_adapters(shapes_of(subject))
    weights = {p.untyped_storage().data_ptr() for p in subject.networks()[0].parameters()}
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        def method(denoiser: Any, x: Any, conds: Any, recompute: bool = recompute, note: Any = note) -> None:
            own = {name: LowRank(a.down.clone().requires_grad_(), a.up) for name, a in adapters.items()}
            with denoiser.differentiable(recompute=recompute), denoiser.adapters(own):
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    estimate = denoiser.denoised(x, SIGMA, conds[0])
                estimate.sum().backward()

        subject.run(x, method, gradients=True)
        kept[recompute] = sum(sizes.values())
    assert kept[True] < 0.5 * kept[False]


def test_attention_hooks_see_what_adapters_change(subject: Any) -> None:
    """Queries of a hooked layer are the adapted ones, also while blocks are computed again."""
    x, adapters = torch.randn(1, 4, 16, 16), random_adapters(shapes_of(subject))

    def method(denoiser: Any, x: Any, conds: Any) -> Any:
        seen: list[list[Any]] = [[], []]
        results = []
        for recompute, queries in enumerate(seen):

            def hook(call: Any, q: Any, k: Any, v: Any, queries: list[Any] = queries) -> Any:
                queries.append((call.block, call.index, call.kind, q.detach().clone()))
                return call.attend(q, k, v)

            with (
                denoiser.differentiable(recompute=bool(recompute)),
                denoiser.adapters(adapters),
                denoiser.attention(hook),
            ):
                y = x.clone().requires_grad_()
                results.append(torch.autograd.grad(denoiser.denoised(y, SIGMA, conds[0]).square().sum(), y)[0])
        return seen, results

    (once, twice), (one, other) = subject.run(x, method, gradients=True)
    assert_rounds_to(one, other, 3 * subject.roundings)
    again = {call[:3]: call[3] for call in twice[len(once) :]}
    assert len(twice) == 2 * len(once) and len(again) == len(once)
    for block, index, kind, queries in once:
        assert_rounds_to(again[block, index, kind], queries, subject.roundings)


def test_the_loss_falls(subject: Any) -> None:
    x = torch.randn(1, 4, 8, 8)
    shown: list[tuple[int, int, float]] = []
    found = trained(subject, x, lambda *step: shown.append(step), steps=8, at_once=2, learning_rate=5e-3)
    assert found.after < 0.95 * found.before
    assert (found.evaluations, found.backwards) == (8 * 2 + 2 * PROBES, 8 * 2)
    assert [step[:2] for step in shown] == [(i, 8) for i in range(1, 9)]
    assert [step[2] for step in shown] == found.losses
    assert subject.reports[-1] == (8, 8)
    assert all(not t.requires_grad and not t.is_inference() for a in found.adapters.values() for t in (a.down, a.up))


def test_rows_at_once_and_recomputation_change_nothing(subject: Any) -> None:
    x = torch.randn(2, 4, 8, 8)
    plain = trained(subject, x)
    for other in (trained(subject, x, at_once=2), trained(subject, x, recompute=True)):
        assert other.losses == pytest.approx(plain.losses, rel=tolerance(3 * subject.roundings))
        for name, adapter in plain.adapters.items():
            assert_trained_alike(other.adapters[name].up, adapter.up, 3 * subject.roundings)


def test_stop_leaves_the_model_as_it_was(subject: Any) -> None:
    x = torch.randn(1, 4, 8, 8)
    before = predictions(subject, x)
    state = [(p.data_ptr(), p.requires_grad, p.grad is None) for p in subject.networks()[0].parameters()]

    def method(denoiser: Any, x: Any, conds: Any) -> None:
        with subject.interrupted() as stopped, pytest.raises(stopped):
            train(denoiser, x, conds[0], subject.host.training_sigmas(), LoraTraining(**SETTINGS, recompute=True))

    subject.run(x, method, gradients=True)
    assert torch.equal(predictions(subject, x), before)
    assert state == [(p.data_ptr(), p.requires_grad, p.grad is None) for p in subject.networks()[0].parameters()]
    assert not any(module._forward_hooks or "forward" in vars(module) for module in subject.networks()[0].modules())


class TestInsideComfyUI:
    def make(self, subject: Any, **settings: Any) -> Any:
        from retrace.hosts.comfyui.runs.identity_lora import train_lora

        host = subject.host
        samples = host.from_model_scale(torch.randn(1, 4, 8, 8))
        training = LoraTraining(**{**SETTINGS, "learning_rate": 1e-2, **settings})
        return train_lora(host, samples, host.encode_text("a red circle"), training)

    def test_cores_patches_do_what_the_adapters_do(self, comfy_subject: Any, tmp_path: Path) -> None:
        """As a patched MODEL, through core's loader, and from a file."""
        import comfy.sd
        import comfy.utils
        import safetensors.torch

        from retrace.hosts.comfyui import ComfyHost

        host, made, x = comfy_subject.host, self.make(comfy_subject), torch.randn(1, 4, 16, 16)
        expected, plain = predictions(comfy_subject, x, made.result.adapters), predictions(comfy_subject, x)
        assert float((expected - plain).abs().max()) > 1e-3
        safetensors.torch.save_file(made.lora, str(tmp_path / "lora.safetensors"))
        file = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"), safe_load=True)
        assert file.keys() == made.lora.keys()
        bits = []
        try:
            for model in (
                made.model,
                comfy.sd.load_lora_for_models(host.model, None, made.lora, 1.0, 0.0)[0],
                comfy.sd.load_lora_for_models(host.model, None, file, 1.0, 0.0)[0],
            ):
                assert len(model.patches) == len(made.result.adapters)
                comfy_subject.host = ComfyHost(model, host.clip, host.vae)
                bits.append(predictions(comfy_subject, x))
        finally:
            comfy_subject.host = host
        assert_rounds_to(bits[0], expected, comfy_subject.roundings)
        assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2])
        assert torch.equal(predictions(comfy_subject, x), plain)

    def test_a_lora_on_a_lora(self, comfy_subject: Any) -> None:
        """Training begins from what the MODEL does with the patches that it has."""
        from retrace.hosts.comfyui import ComfyHost

        first = self.make(comfy_subject)
        original = comfy_subject.host
        comfy_subject.host = ComfyHost(first.model, original.clip)
        try:
            torch.manual_seed(0)
            second = self.make(comfy_subject)
        finally:
            comfy_subject.host = original
        assert second.result.before != first.result.before
        assert all(len(patches) == 2 for patches in second.model.patches.values())

    def test_the_fingerprint_tells_models_apart_and_lasts(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui import ComfyHost

        torch.manual_seed(0)
        made = self.make(comfy_subject)
        torch.manual_seed(0)
        again = self.make(comfy_subject)
        digests = [ComfyHost(model).fingerprint() for model in (made.model, again.model, comfy_subject.host.model)]
        assert digests[0] == digests[1] != digests[2]

    def test_gradients_are_those_of_diffusers(self, comfy_subject: Any) -> None:
        pytest.importorskip("diffusers")
        from retrace.hosts.diffusers import DiffusersHost

        x, adapters = torch.randn(1, 4, 16, 16), random_adapters(shapes_of(comfy_subject))
        ours = gradients(comfy_subject, x, adapters)
        host = DiffusersHost.load(comfy_subject.folder, device="cpu", dtype=torch.float32)

        class Other:
            def run(self, x: Any, method: Any, gradients: bool) -> Any:
                words = {"0": host.encode_text("a red circle")}
                return host.run(x, words, lambda model, x, c: method(model, x, [c["0"]]), gradients=gradients)

        theirs = gradients(Other(), x, adapters)
        for name in adapters:
            assert_rounds_to(ours[name].down, theirs[name].down, 3 * comfy_subject.roundings)
            assert_rounds_to(ours[name].up, theirs[name].up, 3 * comfy_subject.roundings)

    def test_rows_share_no_pass_where_a_patch_may_ask_for_its_level(self, comfy_subject: Any) -> None:
        import comfy.patcher_extension

        from retrace.hosts.comfyui import ComfyHost
        from retrace.hosts.comfyui.runs.identity_lora import train_lora

        host = comfy_subject.host
        words, rows = host.encode_text("a red circle"), []
        model = host.model.clone()

        def count(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            rows.append(len(x))
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", count)
        train_lora(ComfyHost(model), torch.randn(1, 4, 8, 8), words, LoraTraining(2, 1, batch_size=2, at_once=2))
        assert set(rows) == {1}

    def test_refusals(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.network.lora import projection_layers
        from retrace.hosts.comfyui.runs.identity_lora import train_lora

        host = comfy_subject.host
        words = host.encode_text("a red circle")
        with pytest.raises(UnsupportedModel, match="needs a UNet of the"):
            projection_layers(torch.nn.Linear(1, 1))
        timed = [[words[0][0], {**words[0][1], "start_percent": 0.5}]]
        with pytest.raises(RetraceError, match="time range"):
            train_lora(host, torch.randn(1, 4, 8, 8), timed)
        with pytest.raises(RetraceError, match="it is empty"):
            train_lora(host, torch.zeros(1, 4, 8, 8), words)
        with pytest.raises(RetraceError, match="16 channels"):
            train_lora(host, torch.randn(1, 16, 8, 8), words)
        with pytest.raises(RetraceError, match="CONDITIONING is needed"):
            train_lora(host, torch.randn(1, 4, 8, 8), None)  # type: ignore[arg-type]
