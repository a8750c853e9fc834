"""DDIM Inverter: its noise goes through core's samplers and comes back, and survives a file."""

from __future__ import annotations

from pathlib import Path

import graphs
import pytest
import torch

from retrace.metrics import PSNR_CAP
from tools.comfyui.server import ComfyError, ComfyServer

pytestmark = pytest.mark.usefixtures("pebble")


def _custom(latent: str, sigmas: list[object]) -> dict[str, object]:
    return graphs.node(
        "SamplerCustom", model=["pebble", 0], add_noise=False, noise_seed=1, cfg=1.0, positive=["caption", 0],
        negative=["empty", 0], sampler=["ksampler", 0], sigmas=sigmas, latent_image=[latent, 0],
    )  # fmt: skip


def _round_trip(**changes: object) -> graphs.Graph:
    graph = graphs.base() | {
        "invert": graphs.inverter(**changes),
        "advanced": graphs.retracing_sampler(),
    }
    graph["ksampler"] = graphs.node("KSamplerSelect", sampler_name="euler")
    graph["custom"] = _custom("invert", ["invert", 2])
    saved = {f"save_{name}": graphs.save(name) for name in ("advanced", "custom", "encode")}
    return graph | saved


def test_both_samplers_walk_the_same_way_back(server: ComfyServer) -> None:
    result = server.run(_round_trip())
    advanced, custom = (graphs.latent(server, result, f"save_{name}") for name in ("advanced", "custom"))
    # One takes the scheduler by name, the other the sigmas of the inverter.
    assert torch.allclose(advanced, custom, atol=1e-4)


def test_the_chosen_sampler_goes_forward(newest_server: ComfyServer) -> None:
    graph = _round_trip(sampler_name="ddim")
    graph["custom"]["inputs"]["sampler"] = ["invert", 4]
    result = newest_server.run(graph)
    advanced, custom = (graphs.latent(newest_server, result, f"save_{name}") for name in ("advanced", "custom"))
    assert torch.allclose(advanced, custom, atol=1e-4)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "lcm"])
def test_stochastic_samplers_are_refused_by_name(newest_server: ComfyServer, name: str) -> None:
    with pytest.raises(ComfyError, match=f"DDIM Inverter: The sampler '{name}' adds fresh noise.*ddim, euler"):
        newest_server.run(_round_trip(sampler_name=name))


def test_core_may_write_into_the_sigmas_it_is_given(newest_server: ComfyServer) -> None:
    graph = _round_trip(sampler_name="uni_pc")
    graph["custom"]["inputs"]["sampler"] = ["invert", 4]
    newest_server.run(graph)
    # The trajectory, which comes from the cache now, must have kept its own sigmas: write it and walk along the file's.
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="written_to", overwrite=True)
    newest_server.run(graph)
    graph["load"] = graphs.node("RetraceLoadInversion", name="written_to", folder="output", model=["pebble", 0])
    graph["again"] = _custom("load", ["load", 2])
    graph["save_again"] = graphs.save("again")
    result = newest_server.run(graph)
    again, advanced = (graphs.latent(newest_server, result, f"save_{name}") for name in ("again", "advanced"))
    assert torch.allclose(advanced, again, atol=1e-4)


def test_the_report_says_what_the_sampler_finds(newest_server: ComfyServer) -> None:
    graph = _round_trip(verify=True)
    graph["invert"]["inputs"]["vae"] = ["pebble", 2]
    result = newest_server.run(graph)
    back, source = (graphs.latent(newest_server, result, f"save_{name}") for name in ("custom", "encode"))
    ratio = (source.amax() - source.amin()) ** 2 / (back - source).square().mean()
    text = result.text_of("invert")
    said = float(text.partition("return, latent")[2].split()[0])
    assert said == pytest.approx(float(10 * ratio.log10()), abs=0.05)
    for words in ("ddim", f"{graphs.STEPS} steps", "return, image", "network evaluations", "peak memory"):
        assert words in text


@pytest.mark.parametrize("method", ["ddim", "fixed_point"])
def test_trained_pebble_returns(server: ComfyServer, trained_pebble: None, method: str) -> None:
    graph = _round_trip(method=method, steps=50)
    graph["advanced"]["inputs"]["steps"] = 50
    graph["decode"] = graphs.node("VAEDecode", samples=["advanced", 0], vae=["pebble", 2])
    graph["own"] = graphs.node("VAEDecode", samples=["encode", 0], vae=["pebble", 2])
    graph["everywhere"] = graphs.solid_mask(1.0)
    graph["report"] = graphs.node(
        "RetraceEditReport", edited=["decode", 0], source=["own", 0], mask=["everywhere", 0], lpips=False
    )
    text = server.run(graph).text_of("report")
    psnr = float(text.partition("overall")[2].split()[0].lstrip(">="))
    assert psnr > (35 if method == "fixed_point" else 22), text


def test_spdinv_leaves_the_model_as_it_was(server: ComfyServer) -> None:
    plain = graphs.base() | {"sample": graphs.sampler(), "save": graphs.save("sample")}
    before = graphs.latent(server, server.run(plain), "save")
    inverted = graphs.base() | {"invert": graphs.inverter(method="spdinv", steps=2, max_iterations=2)}
    inverted["save"] = graphs.save("invert")
    assert torch.isfinite(graphs.latent(server, server.run(inverted), "save")).all()
    plain["sample"]["inputs"]["seed"] = 6  # not from the cache
    server.run(plain)
    plain["sample"]["inputs"]["seed"] = 5
    plain["save"]["inputs"]["filename_prefix"] = "latents/again"
    assert torch.equal(before, graphs.latent(server, server.run(plain), "save"))


def test_a_batch_inverts_like_its_members(newest_server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter()}
    graph["twice"] = graphs.node("RepeatLatentBatch", samples=["encode", 0], amount=2)
    graph["both"] = graphs.inverter(latent=["twice", 0])
    graph |= {"save_invert": graphs.save("invert"), "save_both": graphs.save("both")}
    result = newest_server.run(graph)
    one, both = (graphs.latent(newest_server, result, f"save_{name}") for name in ("invert", "both"))
    assert both.shape[0] == 2
    assert torch.allclose(both, one.expand_as(both), atol=1e-3)


def test_reference_schedule_drives_the_inverter(newest_server: ComfyServer) -> None:
    graph = _round_trip(sigmas=["schedule", 0])
    graph["schedule"] = graphs.node(
        "RetraceReferenceSchedule", model=["pebble", 0], grid="leading_1", steps=graphs.STEPS, parity=False
    )
    graph["custom"]["inputs"]["sigmas"] = ["schedule", 0]
    del graph["advanced"], graph["save_advanced"]
    assert torch.isfinite(graphs.latent(newest_server, newest_server.run(graph), "save_custom")).all()


def test_flow_models_come_back_through_core(newest_server: ComfyServer) -> None:
    """Core starts a flow model at (1 - sigma) * latent; the noise must survive that."""
    graph = _round_trip(model=["flow", 0], method="fixed_point", max_iterations=50)
    graph["flow"] = graphs.node("ModelSamplingSD3", model=["pebble", 0], shift=1.0)
    graph["custom"]["inputs"]["model"] = ["flow", 0]
    graph["again"] = graphs.inverter(model=["flow", 0], method="fixed_point", max_iterations=50, verify=True)
    graph["show"] = graphs.node("PreviewAny", source=["again", 3])
    del graph["advanced"], graph["save_advanced"]
    result = newest_server.run(graph)
    back, source = (graphs.latent(newest_server, result, f"save_{name}") for name in ("custom", "encode"))
    ratio = (source.amax() - source.amin()) ** 2 / (back - source).square().mean()
    said = float(result.text_of("again").partition("return, latent")[2].split()[0])
    assert min(float(10 * ratio.log10()), PSNR_CAP) == pytest.approx(said, abs=1.0)


def test_an_inversion_survives_its_file(server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter(), "save_invert": graphs.save("invert")}
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="round_trip", overwrite=True)
    before = graphs.latent(server, server.run(graph), "save_invert")
    graph = {"pebble": graphs.node("RetraceLoadPebble")}
    graph["load"] = graphs.node("RetraceLoadInversion", name="round_trip", folder="output", model=["pebble", 0])
    graph["save_load"] = graphs.save("load")
    assert torch.equal(before, graphs.latent(server, server.run(graph), "save_load"))


def test_saving_numbers_instead_of_replacing(newest_server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter(steps=1)}
    for number in range(2):
        graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="often", overwrite=False)
        graph["other"] = graphs.node("PreviewAny", source=["keep", 0], note=number)
        graph["keep"]["inputs"]["name"] = "often" + ".safetensors" * number  # another input, so that it runs again
        newest_server.run(graph)
    names = {path.name for path in (newest_server.base / "output").glob("often*")}
    assert names == {"often.safetensors", "often_2.safetensors"}


def _save_as(server: ComfyServer, name: str, content: bytes) -> None:
    Path(server.base / "output" / f"{name}.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("../escape", None, "path parts"),
        ("nothing_there", None, "there is no file 'nothing_there.safetensors'"),
        ("garbage", b"this is no safetensors file", "cannot be read as an inversion"),
    ],
)
def test_bad_files_are_named(newest_server: ComfyServer, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        _save_as(newest_server, name, content)
    graph = {"load": graphs.node("RetraceLoadInversion", name=name, folder="output")}
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["load", 1], name="copy", overwrite=True)
    with pytest.raises(ComfyError, match="Load Inversion") as caught:
        newest_server.run(graph)
    assert words in str(caught.value)
    assert caught.value.node_type == "RetraceLoadInversion"


def test_truncated_and_foreign_inversions(newest_server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter()}
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="whole", overwrite=True)
    newest_server.run(graph)
    whole = (newest_server.base / "output" / "whole.safetensors").read_bytes()
    _save_as(newest_server, "cut", whole[:-100])
    load = {"load": graphs.node("RetraceLoadInversion", name="cut", folder="output")}
    load["keep"] = graphs.node("RetraceSaveInversion", trajectory=["load", 1], name="copy", overwrite=True)
    with pytest.raises(ComfyError, match="truncated"):
        newest_server.run(load)
    # The same file under a model with another weight in it.
    load = {"pebble": graphs.node("RetraceLoadPebble"), "again": graphs.node("RetraceLoadPebble")}
    load["other"] = graphs.node("ModelMergeSubtract", model1=["pebble", 0], model2=["pebble", 0], multiplier=0.5)
    load["load"] = graphs.node("RetraceLoadInversion", name="whole", folder="output", model=["other", 0])
    load["keep"] = graphs.node("RetraceSaveInversion", trajectory=["load", 1], name="copy", overwrite=True)
    with pytest.raises(ComfyError, match="another model"):
        newest_server.run(load)
    assert not (newest_server.base / "output" / "copy.safetensors").exists()


def test_the_latent_needs_the_model(newest_server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter()}
    graph["keep"] = graphs.node("RetraceSaveInversion", trajectory=["invert", 1], name="blocked", overwrite=True)
    newest_server.run(graph)
    load = {"load": graphs.node("RetraceLoadInversion", name="blocked", folder="output"), "save": graphs.save("load")}
    result = newest_server.run(load)  # ComfyUI tells the browser why, and does not run what depends on it
    assert "save" not in result.outputs
