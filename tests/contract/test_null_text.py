"""Null-text optimisation on a real network in both hosts, and its conditioning inside core's samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidInput, InvalidSchedule, TrajectoryMismatch
from retrace.core.sampling import sample_ddim
from retrace.inversion.invert import InversionSettings, invert
from retrace.inversion.null_text.optimise import optimise_null_text
from retrace.inversion.null_text.settings import Mode, NullTextSettings

PROMPTS = ("a large red circle", "")
STEPS = 3
TWO = NullTextSettings(iterations=2, early_stop=0.0)


def optimised(subject: Any, settings: NullTextSettings, images: int = 1) -> Any:
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)

    def method(model: Any, x: Any, conds: Any) -> Any:
        trajectory = invert(model, x, sigmas, conds[0])
        found = optimise_null_text(model, trajectory, conds[0], conds[1], settings)
        replaced = [conds[1].with_embedding(e.to(x)) for e in found.embeddings]
        back = found.start.to(x)
        for i, uncond in enumerate(replaced):
            back = sample_ddim(model, back, found.sigmas[i : i + 2], conds[0], uncond, found.scale)
        plain = sample_ddim(model, found.start.to(x), sigmas, conds[0], conds[1], found.scale)
        return found, trajectory, (back - x).square().mean(), (plain - x).square().mean()

    latent = torch.randn(images, 4, 8, 8) * 0.5
    return subject.run(latent, method, *PROMPTS, gradients=True)


@pytest.mark.parametrize("parity", [True, False])
def test_it_comes_back_closer_than_the_plain_negative(subject: Any, parity: bool) -> None:
    settings = NullTextSettings(iterations=6, early_stop=0.0)
    found, trajectory, back, plain = optimised(subject, settings.reference() if parity else settings)
    assert found.embeddings.shape == (STEPS, 1, 77, 64)
    assert float(back) < 0.8 * float(plain)  # the weights may be random ones
    if parity:
        assert found.evaluations == sum(3 + k for k in found.iterations)
    else:
        assert found.evaluations == sum(2 + k for k in found.iterations)
    assert found.backwards == sum(found.iterations)
    span = trajectory.source.amax() - trajectory.source.amin()
    assert found.latent_psnr == pytest.approx(float(10 * (span**2 / back).log10()), abs=0.1)


@pytest.mark.rounding
def test_images_of_a_batch_do_not_meet(subject: Any) -> None:
    """The losses of each image are those it has alone, from the same noise."""
    both, _, _, _ = optimised(subject, TWO.reference(), images=2)
    torch.manual_seed(0)
    first = (torch.randn(2, 4, 8, 8) * 0.5)[:1]
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)

    def method(model: Any, x: Any, conds: Any) -> Any:
        trajectory = invert(model, x, sigmas, conds[0])
        return optimise_null_text(model, trajectory, conds[0], conds[1], TWO.reference())

    torch.manual_seed(0)
    alone = subject.run(first, method, *PROMPTS, gradients=True)
    torch.testing.assert_close(both.losses[0][:, :1], alone.losses[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["global", "random_pivot", "no_pivot", "prompt", "prompt_no_pivot"])
def test_the_ablations_run(subject: Any, mode: Mode) -> None:
    found, _, back, _ = optimised(subject, replace(TWO, mode=mode))
    assert found.embeddings.shape == (STEPS, 1, 77, 64)
    assert torch.isfinite(found.embeddings).all() and torch.isfinite(back)


def test_stop_is_obeyed_and_leaves_the_host_usable(subject: Any) -> None:
    sigmas = subject.host.sigmas("ddim_uniform", STEPS)

    def method(model: Any, x: Any, conds: Any) -> Any:
        trajectory = invert(model, x, sigmas, conds[0])
        with subject.interrupted() as stopped, pytest.raises(stopped):
            optimise_null_text(model, trajectory, *conds)
        return trajectory

    subject.run(torch.randn(1, 4, 8, 8), method, *PROMPTS, gradients=True)
    found, *_ = optimised(subject, NullTextSettings(iterations=1))
    assert torch.isfinite(found.embeddings).all()


class TestInsideComfyUI:
    """The conditioning as core's own code sees it."""

    SETTINGS = NullTextSettings(iterations=3, early_stop=0.0)

    def make(self, subject: Any, scheduler: str = "ddim_uniform", steps: int = 4) -> Any:
        from retrace.hosts.comfyui.runs.inversion import invert_latent
        from retrace.hosts.comfyui.runs.null_text import optimise

        host = subject.host
        samples = host.from_model_scale(torch.randn(1, 4, 8, 8) * 0.5)
        sigmas = host.sigmas(scheduler, steps)
        positive, negative = (host.encode_text(prompt) for prompt in PROMPTS)
        inverted = invert_latent(host, samples, sigmas, positive, InversionSettings(), verify=False)
        return samples, sigmas, optimise(host, inverted.trajectory, positive, negative, self.SETTINGS)

    def sample(self, subject: Any, made: Any, sigmas: Any, sampler: str = "euler", images: int = 1) -> Any:
        import comfy.sample
        import comfy.samplers

        latent = made.noise.repeat(images, 1, 1, 1)
        return comfy.sample.sample_custom(
            subject.host.model, torch.zeros_like(latent), 7.5, comfy.samplers.sampler_object(sampler), sigmas,
            made.positive, made.negative, latent, disable_pbar=True,
        )  # fmt: skip

    def test_core_samples_what_was_optimised(self, comfy_subject: Any) -> None:
        samples, sigmas, made = self.make(comfy_subject)
        back = comfy_subject.host.to_model_scale(self.sample(comfy_subject, made, sigmas))
        source = comfy_subject.host.to_model_scale(samples)
        span = source.amax() - source.amin()
        psnr = 10 * (span**2 / (back - source).square().mean()).log10()
        assert float(psnr) == pytest.approx(made.result.latent_psnr, abs=0.05)

    def test_v_prediction(self, comfy_subject: Any) -> None:
        import comfy.model_sampling

        from retrace.hosts.comfyui import ComfyHost

        class VSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
            pass

        model = comfy_subject.host.model.clone()
        model.add_object_patch("model_sampling", VSampling(model.model.model_config))
        original, comfy_subject.host = comfy_subject.host, ComfyHost(model, comfy_subject.host.clip)
        try:
            self.test_core_samples_what_was_optimised(comfy_subject)
        finally:
            comfy_subject.host = original

    def test_pooled_vectors_of_sdxl(self, comfy_subject: Any) -> None:
        """An SDXL in miniature: the two prompts have pooled vectors of their own, so nothing may be shared."""
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        from retrace.hosts.comfyui import ComfyHost
        from retrace.hosts.comfyui.runs.inversion import invert_latent
        from retrace.hosts.comfyui.runs.null_text import optimise
        from retrace.hosts.comfyui.types import ConditioningList

        config = comfy.supported_models.SDXL(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
                "channel_mult": [1, 2], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
                "transformer_depth_middle": 1, "use_linear_in_transformer": True, "num_classes": "sequential",
                "adm_in_channels": 2816, "num_head_channels": 32, "context_dim": 48, "use_spatial_transformer": True,
                "legacy": False, "dtype": torch.float32,
            }
        )  # fmt: skip
        model = comfy.model_base.SDXL(config, device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        host = ComfyHost(comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")))

        def words() -> ConditioningList:
            return [[torch.randn(1, 77, 48), {"pooled_output": torch.randn(1, 1280)}]]

        positive, negative = words(), words()
        sigmas = host.sigmas("ddim_uniform", 3)
        inverted = invert_latent(host, torch.randn(1, 4, 8, 8), sigmas, positive, InversionSettings(), verify=False)
        made = optimise(host, inverted.trajectory, positive, negative, self.SETTINGS)
        assert made.result.evaluations == sum(2 + k for k in made.result.iterations)
        assert all(options["pooled_output"] is negative[0][1]["pooled_output"] for _, options in made.negative)
        original, comfy_subject.host = comfy_subject.host, host
        try:
            back = host.to_model_scale(self.sample(comfy_subject, made, sigmas))
        finally:
            comfy_subject.host = original
        source = inverted.trajectory.source
        span = source.amax() - source.amin()
        psnr = 10 * (span**2 / (back - source).square().mean()).log10()
        assert float(psnr) == pytest.approx(made.result.latent_psnr, abs=0.05)

    def test_both_conditions_share_a_batch(self, comfy_subject: Any) -> None:
        """The guard rides on the conditions without separating them."""
        _, sigmas, made = self.make(comfy_subject)
        batches = []
        model = comfy_subject.host.model.clone()

        def count(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(len(x))
            return executor(x, *args, **kwargs)

        import comfy.patcher_extension

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", count)
        original, comfy_subject.host.model = comfy_subject.host.model, model
        try:
            self.sample(comfy_subject, made, sigmas)
        finally:
            comfy_subject.host.model = original
        assert batches == [2] * 4

    @pytest.mark.parametrize(("scheduler", "steps"), [("ddim_uniform", 5), ("karras", 4), ("normal", 3)])
    def test_other_levels_are_refused(self, comfy_subject: Any, scheduler: str, steps: int) -> None:
        _, _, made = self.make(comfy_subject)
        with pytest.raises(TrajectoryMismatch, match="noise level"):
            self.sample(comfy_subject, made, comfy_subject.host.sigmas(scheduler, steps))

    def test_samplers_between_the_levels_are_refused(self, comfy_subject: Any) -> None:
        _, sigmas, made = self.make(comfy_subject)
        with pytest.raises(TrajectoryMismatch, match="euler or ddim"):
            self.sample(comfy_subject, made, sigmas, "dpm_2")

    def test_another_time_range_is_refused(self, comfy_subject: Any) -> None:
        _, sigmas, made = self.make(comfy_subject)
        for entry in made.negative:
            entry[1] |= {"start_percent": 0.0, "end_percent": 1.0}
        with pytest.raises(TrajectoryMismatch, match="time range"):
            self.sample(comfy_subject, made, sigmas)

    def test_other_batches_are_refused(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.runs.null_text import conditioning_per_step

        _, sigmas, made = self.make(comfy_subject)
        sampling = comfy_subject.host.model.get_model_object("model_sampling")
        two = made.result.embeddings.repeat(1, 2, 1, 1)
        given = comfy_subject.host.encode_text("")
        made = type(made)(made.positive, conditioning_per_step(sampling, sigmas, two, given), made.noise, made.result)
        with pytest.raises(TrajectoryMismatch, match="optimised for 2"):
            self.sample(comfy_subject, made, sigmas)
        assert len(self.sample(comfy_subject, made, sigmas, images=2)) == 2

    def test_the_second_half_may_be_sampled_alone(self, comfy_subject: Any) -> None:
        _, sigmas, made = self.make(comfy_subject)
        assert torch.isfinite(self.sample(comfy_subject, made, sigmas[2:])).all()

    def test_what_else_the_negative_holds_is_kept(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.runs.null_text import conditioning_per_step

        sampling = comfy_subject.host.model.get_model_object("model_sampling")
        pooled, anything = torch.ones(1, 5), object()
        given = [[torch.zeros(1, 77, 64), {"pooled_output": pooled, "something": anything, "strength": 0.5}]]
        made = conditioning_per_step(sampling, torch.tensor([3.0, 1.0, 0.0]), torch.randn(2, 1, 77, 64), given)
        for _, options in made:
            assert options["pooled_output"] is pooled and options["something"] is anything
            assert options["strength"] == 0.5

    @pytest.mark.parametrize("prediction", ["eps", "v_prediction", "flow"])
    @pytest.mark.parametrize("scheduler", ["simple", "normal", "karras", "exponential", "ddim_uniform", "beta"])
    @pytest.mark.parametrize("steps", [1, 4, 50])
    def test_exactly_one_entry_is_active(self, comfy_subject: Any, prediction: str, scheduler: str, steps: int) -> None:
        """By core's own conversion of percents and its own test of an entry."""
        import comfy.model_sampling
        import comfy.samplers

        from retrace.hosts.comfyui.runs.null_text import conditioning_per_step

        kind: Any = {
            "eps": (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS),
            "v_prediction": (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION),
            "flow": (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST),
        }[prediction]
        sampling = type("Sampling", kind, {})(comfy_subject.host.model.model.model_config)
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        entries = conditioning_per_step(
            sampling, sigmas, torch.zeros(len(sigmas) - 1, 1, 1, 1), [[torch.zeros(1, 1, 1), {}]]
        )
        conds = [{**options, "model_conds": {}, "uuid": i, "number": i} for i, (_, options) in enumerate(entries)]
        comfy.samplers.calculate_start_end_timesteps(type("Model", (), {"model_sampling": sampling}), conds)
        x = torch.zeros(1, 4, 8, 8)
        for i, sigma in enumerate(sigmas[:-1]):
            active = [c["number"] for c in conds if comfy.samplers.get_area_and_mult(c, x, sigma[None]) is not None]
            assert active == [i]

    def test_levels_that_core_cannot_tell_apart(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.runs.null_text import step_ranges

        sampling = comfy_subject.host.model.get_model_object("model_sampling")
        with pytest.raises(InvalidSchedule, match="too close together"):
            step_ranges(sampling, [0.002, 0.001])

    def test_it_refuses_several_prompts_and_other_models(self, comfy_subject: Any) -> None:
        from retrace.hosts.comfyui.runs.null_text import optimise

        samples, _, made = self.make(comfy_subject)
        del samples
        host = comfy_subject.host
        from retrace.core.trajectory import Trajectory

        negative = host.encode_text("")
        trajectory = Trajectory(
            made.result.sigmas, made.result.start.repeat(len(made.result.sigmas), 1, 1, 1, 1), "eps", "other", "ddim"
        )
        with pytest.raises(TrajectoryMismatch, match="another model"):
            optimise(host, trajectory, made.positive, negative, self.SETTINGS)
        trajectory = Trajectory(trajectory.sigmas, trajectory.latents, "eps", host.fingerprint(), "ddim")
        with pytest.raises(InvalidInput, match="exactly one can be optimised"):
            optimise(host, trajectory, made.positive, made.negative, self.SETTINGS)
