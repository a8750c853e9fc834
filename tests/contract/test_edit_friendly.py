"""Edit-friendly inversion on a real network in both hosts, and its SAMPLER inside core's guiders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidInput, TrajectoryMismatch
from retrace.inversion.edit_friendly import EditFriendlySettings, invert_edit_friendly, sample_edit_friendly
from retrace.inversion.invert import latent_psnr

PROMPTS = ("a large red circle", "", "a blue square")
SCALE = 3.5
STEPS = 5


def found_for(subject: Any, latent: Any, *prompts: str, batch: int = 4) -> Any:
    """The noises, the way back and an edit."""
    settings = EditFriendlySettings(SCALE, seed=1, batch=batch)
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)

    def method(model: Any, x: Any, conds: Any) -> Any:
        source, empty, target = conds
        found = invert_edit_friendly(model, x, sigmas, source, empty, settings)
        back = sample_edit_friendly(model, found, source, empty, SCALE, skip=1)
        return found, back, sample_edit_friendly(model, found, target, empty, 7.5, skip=1)

    return subject.run(latent, method, *(prompts or PROMPTS))


def test_it_returns_to_the_latent(subject: Any) -> None:
    latent = torch.randn(2, 4, 8, 8) * 0.5
    found, back, edited = found_for(subject, latent)
    assert torch.equal(found.trajectory.source, latent)
    assert latent_psnr(back, latent) > 80
    assert latent_psnr(edited, latent) < 60
    assert found.trajectory.report["evaluations"] == 2 * 2 * STEPS
    assert found.noises.shape == (STEPS, 2, 4, 8, 8) and found.trajectory.method == "edit_friendly"


@pytest.mark.rounding
def test_steps_in_one_batch_equal_steps_one_by_one(subject: Any) -> None:
    """A noise level per row, images in turn, also where the two conditions differ in length."""
    latent = torch.randn(2, 4, 8, 8) * 0.5
    long = "a large red circle " * 30  # two chunks of tokens
    for prompts in (PROMPTS, (long, "", "a blue square")):
        one, *_ = found_for(subject, latent, *prompts, batch=1)
        for batch in (3, STEPS):
            many, *_ = found_for(subject, latent, *prompts, batch=batch)
            torch.testing.assert_close(many.noises, one.noises, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(many.remainder, one.remainder, rtol=1e-3, atol=1e-3)
            assert many.trajectory.report["evaluations"] == one.trajectory.report["evaluations"]


def test_an_embedding_per_image(subject: Any) -> None:
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)
    latent = torch.randn(2, 4, 8, 8) * 0.5

    def method(model: Any, x: Any, conds: Any) -> Any:
        each = conds[0].with_embedding(torch.cat([conds[0].embedding, conds[2].embedding]))
        both = invert_edit_friendly(model, x, sigmas, each, conds[1], EditFriendlySettings(SCALE, seed=1))
        return both, sample_edit_friendly(model, both, each, conds[1], SCALE)

    _, back = subject.run(latent, method, *PROMPTS)
    assert latent_psnr(back, latent) > 80


def test_stop_is_obeyed_and_leaves_the_host_usable(subject: Any) -> None:
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)

    def method(model: Any, x: Any, conds: Any) -> None:
        with subject.interrupted() as stopped, pytest.raises(stopped):
            invert_edit_friendly(model, x, sigmas, conds[0], conds[1])

    latent = torch.randn(1, 4, 8, 8)
    subject.run(latent, method, *PROMPTS)
    assert latent_psnr(found_for(subject, latent)[1], latent) > 80


class TestInsideComfyUI:
    """The SAMPLER as core's guiders drive it."""

    def make(self, host: Any, images: int = 1, batch: int = 4, positive: Any = None) -> Any:
        """A LATENT, what was found for it, and the two conditions."""
        from retrace.hosts.comfyui.runs.edit_friendly import prepare_edit_friendly

        samples = host.from_model_scale(torch.randn(images, 4, 8, 8) * 0.5)
        sigmas = host.sigmas("normal", STEPS)[1:]
        positive, negative = positive or host.encode_text(PROMPTS[0]), host.encode_text(PROMPTS[1])
        settings = EditFriendlySettings(SCALE, seed=1, batch=batch)
        found = prepare_edit_friendly(host, samples, sigmas, positive, negative, settings)
        return samples, found, {"positive": positive, "negative": negative}

    def sample(self, host: Any, found: Any, given: Any, **changes: Any) -> Any:
        import comfy.sample

        from retrace.hosts.comfyui.latents import noise_samples
        from retrace.hosts.comfyui.runs.edit_friendly import noise_sampler

        latent = changes.get("latent", noise_samples(host, found.trajectory))
        noise = changes.get("noise", torch.zeros_like(latent))
        sigmas = changes.get("sigmas", found.trajectory.sigmas)
        return comfy.sample.sample_custom(
            host.model, noise, SCALE, noise_sampler(found), sigmas, changes.get("positive", given["positive"]),
            given["negative"], latent, noise_mask=changes.get("mask"), callback=changes.get("callback"),
            disable_pbar=True,
        )  # fmt: skip

    def test_core_returns_the_latent(self, comfy_subject: Any) -> None:
        host = comfy_subject.host
        samples, found, given = self.make(host, images=2)
        seen = []
        back = self.sample(host, found, given, callback=lambda step, x0, x, total: seen.append((step, total)))
        assert latent_psnr(back, samples) > 80
        assert seen == [(i, STEPS - 1) for i in range(STEPS - 1)]
        edited = self.sample(host, found, given, positive=host.encode_text("a blue square"))
        assert latent_psnr(edited, samples) < 60

    def test_in_two_runs_and_with_more_images(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.latents import noise_samples

        host = comfy_subject.host
        samples, found, given = self.make(host, images=2)
        sigmas = found.trajectory.sigmas
        half = self.sample(host, found, given, sigmas=sigmas[:3])
        assert latent_psnr(self.sample(host, found, given, sigmas=sigmas[2:], latent=half), samples) > 80
        many = self.sample(host, found, given, latent=noise_samples(host, found.trajectory).repeat(3, 1, 1, 1))
        assert latent_psnr(many, samples.repeat(3, 1, 1, 1)) > 80

    @pytest.mark.parametrize("kind", ["v", "flow"])
    @pytest.mark.parametrize("cut", [0, 1])
    def test_other_kinds_of_models(self, comfy_subject: Any, kind: str, cut: int) -> None:
        import comfy.model_sampling

        from retrace.hosts.comfyui import ComfyHost
        from retrace.hosts.comfyui.runs.edit_friendly import prepare_edit_friendly

        bases: Any = {
            "v": (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION),
            "flow": (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST),
        }[kind]
        model = comfy_subject.host.model.clone()
        model.add_object_patch("model_sampling", type("Sampling", bases, {})(model.model.model_config))
        host = ComfyHost(model)
        samples = host.from_model_scale(torch.randn(1, 4, 8, 8) * 0.5)
        positive, negative = (comfy_subject.host.encode_text(prompt) for prompt in PROMPTS[:2])
        sigmas = host.sigmas("normal", STEPS)[cut:]  # a flow schedule begins at 1
        settings = EditFriendlySettings(SCALE, seed=1)
        found = prepare_edit_friendly(host, samples, sigmas, positive, negative, settings)
        given = {"positive": positive, "negative": negative}
        assert latent_psnr(self.sample(host, found, given), samples) > 70

    def test_levels_share_a_call_only_where_nothing_depends_on_them(self, comfy_subject: Any) -> None:
        import node_helpers

        from retrace.hosts.comfyui.conditioning import levels_may_mix

        host = comfy_subject.host
        plain = host.encode_text(PROMPTS[0])
        assert levels_may_mix(host.model, plain, plain)
        timed = node_helpers.conditioning_set_values(plain, {"start_percent": 0.0, "end_percent": 0.5})
        assert not levels_may_mix(host.model, plain, timed)
        patched = host.model.clone()
        patched.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
        assert not levels_may_mix(patched, plain)
        wrapped = host.model.clone()
        wrapped.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
        assert not levels_may_mix(wrapped, plain)
        assert levels_may_mix(host.model, plain)

    def test_conditions_with_a_time_range(self, comfy_subject: Any) -> None:
        """Each half of the levels has its own words; the way back asks for one level at a time."""
        import node_helpers

        host = comfy_subject.host
        early = node_helpers.conditioning_set_values(
            host.encode_text(PROMPTS[0]), {"start_percent": 0.0, "end_percent": 0.5}
        )
        late = node_helpers.conditioning_set_values(
            host.encode_text(PROMPTS[2]), {"start_percent": 0.5, "end_percent": 1.0}
        )
        samples, found, given = self.make(host, positive=early + late)
        assert found.trajectory.report["batch"] == 1 and ", one step at a time, " in found.text()
        assert latent_psnr(self.sample(host, found, given), samples) > 80

    def test_the_report(self, comfy_subject: Any) -> None:
        _, found, _ = self.make(comfy_subject.host, images=2, batch=3)
        text = found.text(12)
        for words in (
            f"edit_friendly, {STEPS - 1} steps, 2 image(s), guidance 3.5, seed 1",
            f"{2 * 2 * (STEPS - 1)} network evaluations, 3 steps at a time, ",
            "strength of the noises",
            "peak memory 12 MB",
        ):
            assert words in text

    def test_what_it_refuses(self, comfy_subject: Any) -> None:
        host = comfy_subject.host
        _, found, given = self.make(host)
        refused = "Edit-friendly Inverter: The sampler "
        with pytest.raises(TrajectoryMismatch, match=refused + "asks for 3 step"):
            self.sample(host, found, given, sigmas=host.sigmas("normal", 3))
        with pytest.raises(TrajectoryMismatch, match=refused + "works on latents"):
            self.sample(host, found, given, latent=torch.randn(1, 4, 8, 16))
        _, two, _ = self.make(host, images=2)
        with pytest.raises(TrajectoryMismatch, match="whole multiples"):
            self.sample(host, two, given, latent=torch.randn(3, 4, 8, 8))
        with pytest.raises(InvalidInput, match="add_noise off"):
            self.sample(host, found, given, noise=torch.randn(1, 4, 8, 8))
        with pytest.raises(InvalidInput, match="Blend Step"):
            self.sample(host, found, given, mask=torch.ones(1, 1, 8, 8))
