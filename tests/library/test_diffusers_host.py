"""The diffusers host beyond the contract: other families and parametrisations, single files, what it refuses.

References are diffusers' own pipelines and schedulers, on random networks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.cli.edit import EditPrompts, EditSettings, edit_image
from retrace.core.errors import InvalidFile, InvalidSchedule, UnsupportedModel
from retrace.core.host import Conditioning, Denoiser
from retrace.hosts.diffusers import DiffusersHost, configs
from retrace.hosts.diffusers.loading import load_parts
from retrace.hosts.diffusers.noise_schedule import SCHEDULERS, NoiseSchedule
from retrace.hosts.diffusers.text import _chunks
from retrace.models.pebble.weights import weights_folder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LONG = "a red circle on striped sand and a blue star " * 12


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    try:
        return weights_folder() / "tokenizer"
    except InvalidFile as error:
        pytest.skip(str(error))


def text_config(width: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    return configs._TEXT | shape | {"projection_dim": width} | more


def tiny(folder: Path, tokenizer: Path, xl: bool, **scheduler: Any) -> Path:
    """A random model of SD's or SDXL's make in the diffusers layout."""
    unet = {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 48 if xl else 32,
        "sample_size": 16,
    }
    # projection: the pooled vector and six numbers of 8 sines and cosines
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet |= extra | {"projection_class_embeddings_input_dim": 16 + 6 * 8} if xl else {}
    vae = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2}
    vae |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "scaling_factor": 0.5}
    big = text_config(16, architectures=["CLIPTextModelWithProjection"], hidden_act="gelu", pad_token_id=0)
    family = configs.Family(
        "sdxl" if xl else "sd1",
        configs._UNET | unet,
        configs._VAE | vae,
        (text_config(32), big) if xl else (text_config(32),),
        configs._SCHEDULER | scheduler,
    )
    configs.write(family, tokenizer, folder)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        diffusers.UNet2DConditionModel.from_config(family.unet).save_pretrained(folder / "unet")
        diffusers.AutoencoderKL.from_config(family.vae).save_pretrained(folder / "vae")
        for number, config in enumerate(family.text):
            cls = getattr(transformers, config["architectures"][0])
            known = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
            cls(transformers.CLIPTextConfig(**known)).save_pretrained(folder / f"text_encoder{'_2' if number else ''}")
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return tiny(tmp_path_factory.mktemp("sd"), tokenizer, xl=False)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return tiny(tmp_path_factory.mktemp("sdxl"), tokenizer, xl=True)


# -- text


def test_chunks_are_75_tokens_between_start_and_end() -> None:
    ids = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    assert _chunks([], ids, 6) == [[1, 2, 0, 0, 0, 0]]
    assert _chunks([5, 6, 7, 8], ids, 6) == [[1, 5, 6, 7, 8, 2]]
    assert _chunks(list(range(10, 19)), ids, 6) == [
        [1, 10, 11, 12, 13, 2],
        [1, 14, 15, 16, 17, 2],
        [1, 18, 2, 0, 0, 0],
    ]


def test_text_of_sd_is_that_of_its_pipeline(sd: Path) -> None:
    host = DiffusersHost.load(sd, device="cpu")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd, local_files_only=True)
    for prompt in ("a red circle", ""):
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(host.encode_text(prompt).embedding, expected.detach())
    assert host.encode_text(LONG).embedding.shape == (1, 154, 32)


def test_text_of_sdxl_is_that_of_its_pipeline(sdxl: Path) -> None:
    host = DiffusersHost.load(sdxl, device="cpu")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl, local_files_only=True)
    expected, _, pooled, _ = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    condition = host.encode_text("a red circle")
    torch.testing.assert_close(condition.embedding, expected.detach())
    torch.testing.assert_close(condition.pooled, pooled.detach())
    long = host.encode_text(LONG)
    assert long.embedding.shape == (1, 154, 48) and long.pooled is not None and long.pooled.shape == (1, 16)


def test_a_list_of_prompts_is_one_condition(sd: Path, sdxl: Path) -> None:
    prompts = ["a red circle", LONG, ""]
    for folder in (sd, sdxl):
        host = DiffusersHost.load(folder, device="cpu")
        together, alone = host.encode_text(prompts), [host.encode_text(p) for p in prompts]
        assert together.embedding.shape[:2] == (3, 154)
        for i, one in enumerate(alone):
            kept = one.embedding.shape[1]
            torch.testing.assert_close(together.embedding[i : i + 1, :kept], one.embedding, rtol=1e-4, atol=1e-4)
            if one.pooled is not None and together.pooled is not None:
                torch.testing.assert_close(together.pooled[i : i + 1], one.pooled, rtol=1e-4, atol=1e-4)
        # What fills up the short ones is a chunk of the empty prompt.
        torch.testing.assert_close(together.embedding[0, 77:], alone[2].embedding[0], rtol=1e-4, atol=1e-4)


def test_text_encoders_work_on_the_device_and_go_back(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DiffusersHost.load(sdxl, device="cpu")
    host._text.device = torch.device("meta")  # stands for a card: nothing of it may be left there
    moves: list[str] = []
    for number, encoder in enumerate(host._text.encoders):
        monkeypatch.setattr(encoder, "to", lambda device, n=number: moves.append(f"{n} {device}"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        host.encode_text("a red circle")
    assert moves == ["0 meta", "0 cpu"]


# -- memory


def test_a_vae_without_room_goes_on_in_tiles(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DiffusersHost.load(sd, device="cpu")
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, decode, calls = host.decode_latent(latent), host.vae.decode, []

    def without_room(*args: Any, **more: Any) -> Any:
        calls.append(host.vae.use_tiling)
        if not host.vae.use_tiling:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return decode(*args, **more)

    monkeypatch.setattr(host.vae, "decode", without_room)
    torch.testing.assert_close(host.decode_latent(latent), expected)  # one tile holds it all here
    assert calls == [False, True]

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(host.vae, "decode", never)
    with pytest.raises(torch.OutOfMemoryError):
        host.decode_latent(latent)


def test_a_model_that_does_not_fit_is_not_called_damaged(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 GB.")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load_parts(sd, torch.float32)


# -- the whole edit


@pytest.mark.parametrize("method", ["ddim", "fixed_point", "spdinv"])
def test_every_method_edits_a_batch_with_its_own_prompts(sd: Path, method: Any) -> None:
    host = DiffusersHost.load(sd, device="cpu")
    image = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    settings = EditSettings(steps=2, method=method, seed=1)
    words = (["a red circle", "a blue star"], ["a green square", "a white star"])
    result = edit_image(host, image, mask, EditPrompts(*words), settings)
    assert torch.isfinite(result.edited).all()
    assert torch.equal(result.edited[mask.expand(2, -1, -1) == 0], image[mask.expand(2, -1, -1) == 0])
    backwards = result.trajectory.report["backwards"]
    assert isinstance(backwards, int) and (backwards > 0) == (method == "spdinv")
    alone = edit_image(host, image[:1], mask, EditPrompts(words[0][0], words[1][0]), settings)
    assert result.trajectory.latents[-1, :1].allclose(alone.trajectory.latents[-1], atol=1e-4)


# -- predictions


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_denoised_is_what_the_ddim_scheduler_of_diffusers_predicts(sd: Path, prediction: str, zero_snr: bool) -> None:
    parts = load_parts(sd, torch.float32)
    settings = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    host = DiffusersHost(parts.__class__(**{**parts.__dict__, "scheduler": {**parts.scheduler, **settings}}), "tiny")
    reference = diffusers.DDIMScheduler.from_config({**configs._SCHEDULER, **settings, "timestep_spacing": "trailing"})
    reference.set_timesteps(1000)
    text = host.encode_text("a red circle")
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))  # variance-preserving scale
    for timestep in (0, 300, 900):
        sigma = float(host.training_sigmas()[timestep])
        x = sample * (1 + sigma**2) ** 0.5

        def predict(model: Denoiser, x: Tensor, conds: Mapping[str, Conditioning], sigma: float = sigma) -> Tensor:
            return model.denoised(x, sigma, conds["c"])

        denoised = host.run(x, {"c": text}, predict)
        with torch.no_grad():
            output = parts.unet(sample, timestep, text.embedding.expand(2, -1, -1)).sample
        expected = reference.step(output, timestep, sample).pred_original_sample
        torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-3)


def test_sdxl_is_told_its_size_height_first(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DiffusersHost.load(sdxl, device="cpu")
    seen: list[dict[str, Any]] = []
    forward = host.unet.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["added_cond_kwargs"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(host.unet, "forward", watched)
    conds = {"a": host.encode_text("a red circle"), "b": host.encode_text("")}
    latent = torch.randn(2, 4, 16, 24)
    one, other = host.run(latent, conds, lambda model, x, c: model.denoised_each(x, 2.0, [c["a"], c["b"]]))
    assert one.shape == latent.shape and not torch.allclose(one, other)
    (added,) = seen
    assert added["time_ids"].tolist() == [[32.0, 48.0, 0.0, 0.0, 32.0, 48.0]] * 4  # two pixels a cell here
    pooled = [vector for name in ("a", "a", "b", "b") if (vector := conds[name].pooled) is not None]
    torch.testing.assert_close(added["text_embeds"], torch.cat(pooled))


# -- noise levels


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_schedules_descend_from_the_top_to_zero(scheduler: str, steps: int) -> None:
    schedule = NoiseSchedule.from_config(configs._SCHEDULER)
    sigmas = schedule.steps(scheduler, steps)
    assert float(sigmas[-1]) == 0
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    assert float(sigmas[0]) <= float(schedule.sigmas[-1]) * (1 + 1e-5)
    if scheduler != "ddim_uniform":
        assert len(sigmas) == steps + 1


def test_timestep_is_the_inverse_of_sigma() -> None:
    schedule = NoiseSchedule.from_config(configs._SCHEDULER)
    assert torch.equal(schedule.timestep(schedule.sigmas), torch.arange(1000))
    torch.testing.assert_close(schedule.sigma(torch.arange(1000)), schedule.sigmas)
    assert schedule.timestep(torch.tensor(1e-9)) == 0 and schedule.timestep(torch.tensor(1e9)) == 999


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_noise() -> None:
    plain, zero = (
        NoiseSchedule.from_config({**configs._SCHEDULER, "rescale_betas_zero_snr": flag}).sigmas
        for flag in (False, True)
    )
    torch.testing.assert_close(plain[0], zero[0], rtol=1e-4, atol=0)
    assert float(zero[-1]) == pytest.approx(4518.76, rel=1e-3)


@pytest.mark.parametrize(("name", "steps"), [("normal", 0), ("normal", 1001), ("best", 10)])
def test_impossible_schedules(name: str, steps: int) -> None:
    with pytest.raises(InvalidSchedule, match=r"0 steps|1001 steps|'best'"):
        NoiseSchedule.from_config({}).steps(name, steps)


# -- files


def checkpoint(path: Path, width: int, *extra: str, channels: int = 4, text: str = "cond_stage_model.") -> Path:
    from safetensors.torch import save_file

    unet = "model.diffusion_model."
    tensors = {
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
        f"{unet}input_blocks.0.0.weight": torch.zeros(2, channels, 1, 1),
        f"{text}x": torch.zeros(1),
        "first_stage_model.decoder.x": torch.zeros(1),
        **{name: torch.linspace(-1, 1, 8) for name in extra},
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("width", "name"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
def test_families_are_recognised(tmp_path: Path, width: int, name: str) -> None:
    family = configs.detect(checkpoint(tmp_path / "m.safetensors", width))
    assert family.name == name
    assert family.scheduler["prediction_type"] == "epsilon"
    assert len(family.text) == (2 if name == "sdxl" else 1)


def test_v_prediction_is_recognised(tmp_path: Path) -> None:
    probe = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    by_bias = configs.detect(checkpoint(tmp_path / "a.safetensors", 1024, probe))
    by_entry = configs.detect(checkpoint(tmp_path / "b.safetensors", 2048, "v_pred", "ztsnr"))
    sd1 = configs.detect(checkpoint(tmp_path / "c.safetensors", 768, probe))
    assert by_bias.scheduler["prediction_type"] == by_entry.scheduler["prediction_type"] == "v_prediction"
    assert by_entry.scheduler["rescale_betas_zero_snr"]
    assert sd1.scheduler["prediction_type"] == "epsilon"
    assert configs.Family("sd1").scheduler["prediction_type"] == "epsilon", "the table was changed"


def test_foreign_and_damaged_files_are_named(tmp_path: Path) -> None:
    flux = checkpoint(tmp_path / "other.safetensors", 4096)
    with pytest.raises(UnsupportedModel, match=r"other\.safetensors holds no UNet"):
        DiffusersHost.load(flux)
    with pytest.raises(UnsupportedModel, match="no text encoder"):
        DiffusersHost.load(checkpoint(tmp_path / "unet.safetensors", 768, text="nothing."))
    (tmp_path / "half.safetensors").write_bytes(flux.read_bytes()[:100])
    with pytest.raises(InvalidFile, match="not a complete"):
        DiffusersHost.load(tmp_path / "half.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(InvalidFile, match=r"model\.ckpt is not a \.safetensors file"):
        DiffusersHost.load(tmp_path / "model.ckpt")
    with pytest.raises(InvalidFile, match="no model at"):
        DiffusersHost.load(tmp_path / "missing")


def test_folders_that_do_not_fit_are_named(tmp_path: Path, sd: Path) -> None:
    with pytest.raises(InvalidFile, match=r"no model_index\.json"):
        DiffusersHost.load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["a", "b"]}))
    with pytest.raises(UnsupportedModel, match="FluxPipeline"):
        DiffusersHost.load(tmp_path)
    incomplete = tmp_path / "incomplete"
    shutil.copytree(sd, incomplete)
    shutil.rmtree(incomplete / "vae")
    with pytest.raises(InvalidFile, match="cannot be read"):
        DiffusersHost.load(incomplete, device="cpu")
    inpainting = tmp_path / "inpainting"
    shutil.copytree(sd, inpainting)
    unet = diffusers.UNet2DConditionModel.from_config(
        {**json.loads((sd / "unet/config.json").read_text()), "in_channels": 9}
    )
    unet.save_pretrained(inpainting / "unet")
    with pytest.raises(UnsupportedModel, match=r"9 channels \(an inpainting model\)"):
        DiffusersHost.load(inpainting, device="cpu")


def test_half_precision_files_have_their_own_name(tmp_path: Path, sd: Path) -> None:
    """Downloads in the fp16 variant hold no other weights; the fingerprint does not depend on the precision."""
    folder = tmp_path / "half"
    shutil.copytree(sd, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert DiffusersHost.load(folder, device="cpu").fingerprint() == DiffusersHost.load(sd, device="cpu").fingerprint()
    half = DiffusersHost.load(sd, device="cpu", dtype=torch.float16)
    assert half.fingerprint() == DiffusersHost.load(sd, device="cpu").fingerprint()


def test_loading_leaves_the_libraries_as_talkative_as_they_were(sd: Path) -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    DiffusersHost.load(sd, device="cpu")
    assert logging.get_verbosity() == before
