"""CLIP guidance as a patch: under core's samplers the same as in the library, at the promised cost, without traces."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.blending.sample import first_latent
from retrace.clip_guidance import Augmentations, ClipGuidance, GuidedRun, Schedule, Weights
from retrace.clip_guidance.step import GradientPath
from retrace.core.sampling import cfg, steered
from retrace.core.sampling import sample as library_sample
from retrace.models.clip.model import load_image_text_model
from retrace.models.pebble.scenes import heldout, instance_masks, render_batch

pytest.importorskip("open_clip")
STEPS = 4
SIDE = 64  # px
PATHS = ["x0", "full"]


@pytest.fixture(scope="module")
def clip() -> Any:
    with torch.inference_mode():
        return load_image_text_model()


@pytest.fixture
def case(comfy_subject: Any, clip: Any) -> Any:
    scene = heldout(1, 3, objects=1)[0]
    host = comfy_subject.host
    # A quarter of the scene, with its object in the middle: the decoder is what takes the time.
    left, top = (min(max(int(c) - SIDE // 2, 0), 128 - SIDE) for c in (scene.objects[0].x, scene.objects[0].y))
    part = (..., slice(top, top + SIDE), slice(left, left + SIDE))
    return SimpleNamespace(
        host=host,
        clip=clip,
        latent=host.vae.encode(render_batch([scene])[part].movedim(1, -1)),
        mask=(instance_masks(scene, 4.0)[part] > 0.5).float(),
        empty=host.encode_text(""),
        words=host.encode_text("a red circle on sand"),
    )


def patched(case: Any, path: Any, *, model: Any = None, schedule: Any = None, vae: Any = "own", **settings: Any) -> Any:
    from retrace.hosts.comfyui.patches.clip_guidance import patch_clip_guidance

    # Weaker than by default: in four steps that would be a blow, whose rounding differences grow.
    weights = Weights(clip=100.0, range=50.0)
    guidance = ClipGuidance(case.clip, "a blue square", case.mask, weights=weights, augmentations=Augmentations(2))
    return patch_clip_guidance(
        model or case.host.model,
        guidance,
        schedule or Schedule(path),
        vae=case.host.vae if vae == "own" else vae,
        **settings,
    )


def sample(
    case: Any, model: Any, cfg: float = 1.0, sampler: str = "euler", batch: int = 1, callback: Any = None
) -> Tensor:
    import comfy.sample

    latent = case.latent.repeat(batch, 1, 1, 1)
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0)).repeat(batch, 1, 1, 1)
    return comfy.sample.sample(  # type: ignore[no-any-return]
        model, noise, STEPS, cfg, sampler, "ddim_uniform", case.words, case.empty, latent, seed=1, disable_pbar=True,
        callback=callback,
    )  # fmt: skip


def counted(model: Any, counts: Counter[str]) -> Any:
    """``model`` with passes of its network counted, per row, and how many of these keep a graph."""
    import comfy.patcher_extension

    def apply(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["forward"] += len(x)
        counts["graph"] += len(x) * x.requires_grad
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", apply)
    return model


@pytest.mark.parametrize("path", PATHS)
def test_it_guides_repeatably_and_leaves_the_model_as_it_was(case: Any, path: GradientPath) -> None:
    before = sample(case, case.host.model)
    guided = patched(case, path)
    one, two = sample(case, guided), sample(case, guided)
    assert torch.equal(one, two) and not torch.allclose(one, before, atol=1e-2)
    assert torch.equal(sample(case, case.host.model), before)
    assert not torch.equal(sample(case, patched(case, path, seed=1)), one)


@pytest.mark.parametrize("path", PATHS)
def test_core_samples_what_the_library_does(case: Any, path: GradientPath) -> None:
    import comfy.samplers

    host = case.host
    through_core = sample(case, patched(case, path), cfg=3.0)
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    highest = float(host.training_sigmas()[-1])
    start = first_latent(host.to_model_scale(case.latent), noise, float(sigmas[0]), highest, host.parametrisation)
    with torch.inference_mode(False):
        mask = case.mask.clone()
    weights = Weights(clip=100.0, range=50.0)
    guidance = ClipGuidance(case.clip, "a blue square", mask, weights=weights, augmentations=Augmentations(2))

    def method(model: Any, x: Tensor, conds: Any) -> Any:
        run = GuidedRun(
            guidance, Schedule(path), sigmas, host.decode_differentiable, model.differentiable, model.parametrisation
        )
        estimate = cfg(model, conds["c"], conds["u"], 3.0)
        found = library_sample(model, x, sigmas, steered(estimate, run.guide))
        return found, model.evaluations, run.backwards

    latent, evaluations, backwards = host.run(start, {"c": case.words, "u": case.empty}, method, gradients=True)
    torch.testing.assert_close(through_core, host.from_model_scale(latent), rtol=1e-3, atol=1e-3)
    assert (evaluations, backwards) == (2 * STEPS, STEPS if path == "full" else 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_guided_step_has_one_forward_pass_per_condition(case: Any, path: GradientPath, cfg: float) -> None:
    counts: Counter[str] = Counter()
    sample(case, counted(patched(case, path), counts), cfg)
    rows = STEPS * (1 if cfg == 1.0 else 2)
    assert counts == Counter(forward=rows, graph=rows if path == "full" else 0)


@pytest.mark.parametrize("path", PATHS)
def test_half_of_the_steps(case: Any, path: GradientPath) -> None:
    counts: Counter[str] = Counter()
    every = patched(case, path, schedule=Schedule(path, every=2))
    sample(case, counted(every, counts))
    assert counts["graph"] == (STEPS // 2 if path == "full" else 0)
    late = patched(case, path, start_percent=0.5)
    never = patched(case, path, start_percent=1.0, end_percent=1.0)
    plain = sample(case, case.host.model)
    assert torch.equal(sample(case, never), plain) and not torch.equal(sample(case, late), plain)
    assert not torch.equal(sample(case, late), sample(case, patched(case, path)))


@pytest.mark.parametrize("path", PATHS)
def test_pictures_of_a_batch_do_not_meet(case: Any, path: GradientPath) -> None:
    from retrace.hosts.comfyui.patches.clip_guidance import patch_clip_guidance

    weights = Weights(
        clip=10.0, range=5.0
    )  # rounding differs with the size of a batch, and strong guidance would enlarge that
    guidance = ClipGuidance(case.clip, "a blue square", case.mask, weights=weights, augmentations=Augmentations(1))
    model = patch_clip_guidance(case.host.model, guidance, Schedule(path), vae=case.host.vae)
    alone, both = sample(case, model), sample(case, model, batch=2)
    torch.testing.assert_close(both, alone.repeat(2, 1, 1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ["euler", "dpm_2_ancestral", "uni_pc"])
def test_before_or_after_blend_step_makes_no_difference(case: Any, path: GradientPath, sampler: str) -> None:
    from retrace.hosts.comfyui.patches.blend import patch_blend

    source = {"samples": case.latent}
    one = sample(case, patch_blend(patched(case, path), source, case.mask), sampler=sampler)
    other = sample(case, patched(case, path, model=patch_blend(case.host.model, source, case.mask)), sampler=sampler)
    assert torch.equal(one, other)
    outside = torch.nn.functional.max_pool2d(case.mask[:, None], 8)[:, 0] == 0
    assert torch.allclose(one[0][:, outside[0]], case.latent[0][:, outside[0]], atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_without_a_vae_it_looks_at_colours(case: Any, path: GradientPath) -> None:
    guided = sample(case, patched(case, path, vae=None))
    assert bool(torch.isfinite(guided).all()) and not torch.equal(guided, sample(case, case.host.model))


def test_kernels_without_a_backward_are_not_used(case: Any) -> None:
    def kernel(function: Any, *args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled(), "this kernel has no backward"
        return function(*args, **kwargs)

    fast = case.host.model.clone()
    fast.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = kernel
    assert not torch.equal(sample(case, patched(case, "full", model=fast)), sample(case, fast))


@pytest.mark.parametrize("path", PATHS)
def test_a_run_inside_a_run_changes_neither(case: Any, path: str) -> None:
    guided = patched(case, path)
    alone = sample(case, guided)
    inner: list[Tensor] = []

    def again(step: int, *_: object) -> None:
        if step == 1:
            running = guided.model.current_patcher  # which core forgets at the end of any run
            inner.append(sample(case, guided))
            guided.model.current_patcher = running

    assert torch.equal(sample(case, guided, callback=again), alone) and torch.equal(inner[0], alone)


@pytest.mark.parametrize("path", PATHS)
def test_stop_in_the_middle(case: Any, path: GradientPath) -> None:
    """Autograd's switches, the CLIP and the model are as before, and the next run is."""
    import comfy.patcher_extension

    class Stop(BaseException):
        pass

    calls: list[int] = []

    def stop(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return executor(*args, **kwargs)

    guided = patched(case, path)
    before = sample(case, guided)
    stopping = guided.clone()
    stopping.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "stop", stop)
    home = case.clip.device
    with pytest.raises(Stop):
        sample(case, stopping)
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled() and case.clip.device == home
    assert torch.equal(sample(case, guided), before)


@pytest.mark.parametrize("path", PATHS)
def test_partly_loaded_models_are_guided_the_same(case: Any, path: GradientPath) -> None:
    """Most layers stay out of memory and come in one by one, as on a small GPU."""
    import comfy.patcher_extension

    guided = patched(case, path)
    weights = {k: v for k, v in guided.model_state_dict().items() if "diffusion_model." in k and v.ndim > 1}
    torch.manual_seed(0)
    guided.add_patches({key: ("diff", (torch.randn(weight.shape) * 0.02,)) for key, weight in weights.items()}, 0.5)
    whole = sample(case, guided)
    lazily: list[int] = []

    def unload(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = guider.model_patcher
        patcher.unpatch_model(patcher.load_device)
        patcher.load(patcher.load_device, lowvram_model_memory=2_000_000)
        lazily.append(sum(len(m.weight_function) > 0 for m in patcher.model.modules() if hasattr(m, "weight_function")))
        return executor(guider, *args, **kwargs)

    small = guided.clone()
    small.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, "unload", unload)
    torch.testing.assert_close(sample(case, small), whole, rtol=1e-3, atol=1e-3)
    assert lazily[0] > 0


@pytest.mark.parametrize("path", PATHS)
def test_a_taesd_makes_the_picture(case: Any, path: GradientPath) -> None:
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(0)
    parts = {"taesd_encoder": TAESD().taesd_encoder, "taesd_decoder": TAESD().taesd_decoder}
    weights = {
        f"{part}.{key}": torch.randn(value.shape) * 0.05  # core leaves weights that it has not loaded as memory was
        for part, network in parts.items()
        for key, value in network.state_dict().items()
    }
    weights |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    vae = comfy.sd.VAE(sd=weights)
    vae.throw_exception_if_invalid()
    guided = sample(case, patched(case, path, vae=vae))
    assert bool(torch.isfinite(guided).all()) and not torch.equal(guided, sample(case, case.host.model))


@pytest.mark.parametrize("paths", [("full", "full"), ("x0", "full"), ("full", "x0")])
def test_two_nodes_in_a_row_both_count(case: Any, paths: tuple[str, str]) -> None:
    inner = patched(case, paths[0])
    both = sample(case, patched(case, paths[1], model=inner, seed=5))
    assert bool(torch.isfinite(both).all()) and not torch.allclose(both, sample(case, inner), atol=1e-2)


def test_latents_of_films_are_refused(case: Any) -> None:
    from retrace.core.errors import UnsupportedModel

    call = SimpleNamespace(noise=torch.zeros(1, 4, 2, 16, 16))
    wrapper = patched(case, "x0").get_wrappers("sampler_sample", "retrace_clip_guidance")[0]
    with pytest.raises(UnsupportedModel, match="single images"):
        wrapper.__self__.begin({"noise": call.noise, "model_wrap": None})


def test_a_move_by_the_variance_is_for_samplers_with_ddpms_noise(case: Any) -> None:
    import comfy.samplers

    patch = patched(case, "x0", schedule=Schedule.reference()).get_wrappers("sampler_sample", "retrace_clip_guidance")[
        0
    ]
    own = {
        name: patch.__self__.schedule_for(comfy.samplers.sampler_object(name)).move
        for name in ("euler", "ddim", "dpmpp_2m_sde", "euler_ancestral", "ddpm")
    }
    assert [name for name, move in own.items() if move == "variance"] == ["euler_ancestral", "ddpm"]
    half = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5})
    assert patch.__self__.schedule_for(half).move == "score"


def test_loras_on_top_count(case: Any) -> None:
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    weight = case.host.model.model.get_parameter(name)
    guided = patched(case, "full")
    before = sample(case, guided)
    changed = guided.clone()
    changed.add_patches({name: ("diff", (torch.full_like(weight, 0.05),))}, 1.0)
    assert not torch.allclose(sample(case, changed), before, atol=1e-4)
    assert torch.equal(sample(case, guided), before)


def test_background_losses_hold_the_background_without_blend_step(case: Any) -> None:
    """Local CLIP-guided diffusion, the paper's baseline: lambda trades the background for the words."""
    from retrace.hosts.comfyui.patches.clip_guidance import patch_clip_guidance

    source = case.host.vae.decode(case.latent)
    far = []
    for weight in (0.0, 10000.0):
        weights = Weights(clip=100.0, range=0.0, background_mse=weight)
        guidance = ClipGuidance(
            case.clip, "a blue square", case.mask, source, weights=weights, augmentations=Augmentations(1)
        )
        model = patch_clip_guidance(case.host.model, guidance, Schedule("x0"), vae=case.host.vae)
        picture = case.host.vae.decode(sample(case, model))
        far.append(float(((picture - source)[0][case.mask[0] == 0]).square().mean()))
    assert far[1] < far[0] / 4
