"""Bad input: every error names the node, says what arrived and what to do, and comes over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import pytest
import torch

from tools.comfyui.server import ComfyError, ComfyServer


def _preview(of: str) -> dict[str, Any]:
    return graphs.node("PreviewImage", images=[of, 0])


def _paste(**changes: Any) -> graphs.Graph:
    inputs = {"edited": ["scene", 0], "source": ["scene", 0], "mask": ["scene", 1], "feather": 2.0}
    return {
        "scene": graphs.node("RetracePebbleScene", index=3, objects=1, margin=0),
        "paste": graphs.node("RetracePasteBackground", **{**inputs, **changes}),
        "show": _preview("paste"),
    }


def test_mask_of_another_size(server: ComfyServer) -> None:
    graph = _paste(mask=["small", 0]) | {"small": graphs.solid_mask(1.0, 96, 64)}
    graphs.fails(server, graph, "RetracePasteBackground", "Paste Background: mask", "96x64", "128x128")


def test_picture_with_alpha(server: ComfyServer) -> None:
    graph = _paste(edited=["alpha", 0])
    graph["alpha"] = graphs.node("JoinImageWithAlpha", image=["scene", 0], alpha=["scene", 1])
    # Core gives RGBA, too, where the picture has an alpha channel.
    graphs.fails(server, graph, "RetracePasteBackground", "Paste Background: edited image", "RGBA")


def test_pictures_of_two_sizes(newest_server: ComfyServer) -> None:
    graph = _paste(edited=["large", 0])
    graph["large"] = graphs.node("EmptyImage", width=256, height=128, batch_size=1, color=0)
    graphs.fails(newest_server, graph, "RetracePasteBackground", "256x128", "128x128")


def test_report_names_its_own_input(newest_server: ComfyServer) -> None:
    graph = _paste()
    graph["large"] = graphs.node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    graph["report"] = graphs.node(
        "RetraceEditReport", edited=["scene", 0], source=["large", 0], mask=["scene", 1], lpips=False
    )
    graphs.fails(newest_server, graph, "RetraceEditReport", "Edit Report: edited image", "64x64")


def test_precision_level_beyond_the_last(newest_server: ComfyServer) -> None:
    graph = _paste(mask=["coarse", 0])
    graph["coarse"] = graphs.node("RetraceMaskPrecisionBlur", mask=["scene", 1], level=6, levels=5, edges="binary")
    graphs.fails(newest_server, graph, "RetraceMaskPrecisionBlur", "Mask Precision Blur: level is 6", "0 to 5")


def test_empty_and_full_masks_are_no_errors(server: ComfyServer) -> None:
    for value in (0.0, 1.0):
        graph = _paste(mask=["solid", 0]) | {"solid": graphs.solid_mask(value)}
        graph["report"] = graphs.node(
            "RetraceEditReport", edited=["paste", 0], source=["scene", 0], mask=["solid", 0], lpips=False
        )
        graph["coarse"] = graphs.node("RetraceMaskPrecisionBlur", mask=["solid", 0], level=3, levels=5, edges="soft")
        graph["show_mask"] = graphs.node("MaskPreview", mask=["coarse", 0])
        assert "mask area" in server.run(graph).text_of("report")


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [("invert", "steps", 0), ("invert", "method", "magic"), ("blend", "shrink_stages", -1), ("blend", "noise", "pink")],
)
def test_impossible_settings_are_refused_before_the_run(
    newest_server: ComfyServer, node: str, name: str, value: Any
) -> None:
    graph = graphs.blended() | {"invert": graphs.inverter(), "save_invert": graphs.save("invert")}
    graph[node]["inputs"][name] = value
    with pytest.raises(ComfyError, match="refused the graph") as caught:
        newest_server.run(graph)
    assert name in str(caught.value)
    assert caught.value.node_id == node


@pytest.mark.usefixtures("pebble")
class TestWithModel:
    def test_empty_mask(self, server: ComfyServer) -> None:
        graph = graphs.blended(mask=["none", 0]) | {"none": graphs.solid_mask(0.0)}
        graphs.fails(server, graph, "RetraceBlendStep", "Blend Step: mask", "0 everywhere", "1 = edit")

    def test_mask_of_load_image_without_one(self, server: ComfyServer) -> None:
        graph = graphs.blended(mask=["none", 0]) | {"none": graphs.solid_mask(0.0, 64, 64)}
        graphs.fails(server, graph, "RetraceBlendStep", "Blend Step: mask", "MaskEditor")

    def test_mask_of_another_size(self, newest_server: ComfyServer) -> None:
        graph = graphs.blended(mask=["small", 0]) | {"small": graphs.solid_mask(1.0, 100, 100)}
        graphs.fails(newest_server, graph, "RetraceBlendStep", "Blend Step: mask", "100x100", "128x128")

    def test_nothing_to_keep(self, newest_server: ComfyServer) -> None:
        graph = graphs.blended(source=None)
        graphs.fails(newest_server, graph, "RetraceBlendStep", "Blend Step: there is no image", "VAE Encode")

    def test_trajectory_noise_without_trajectory(self, newest_server: ComfyServer) -> None:
        graph = graphs.blended(noise="trajectory")
        graphs.fails(newest_server, graph, "RetraceBlendStep", "Blend Step:", "noise:", "Connect 'DDIM Inverter'")

    def test_latent_of_another_kind_of_model(self, server: ComfyServer) -> None:
        graph = graphs.blended(source=["wide", 0])
        graph["wide"] = graphs.node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        graphs.fails(server, graph, "RetraceBlendStep", "Blend Step: source", "16 channels")

    def test_sampling_at_another_size(self, newest_server: ComfyServer) -> None:
        graph = graphs.blended()
        graph["large"] = graphs.node("EmptyLatentImage", width=192, height=128, batch_size=1)
        graph["sample"]["inputs"]["latent_image"] = ["large", 0]
        graphs.fails(
            newest_server, graph, "KSampler", "Blend Step: Blending keeps a source latent", "size of the source"
        )

    def test_sampling_from_above_the_trajectory(self, newest_server: ComfyServer) -> None:
        graph = graphs.blended(source=None, trajectory=["invert", 1], noise="trajectory")
        graph["invert"] = graphs.inverter(sigmas=["lower", 0])
        graph["lower"] = graphs.node("BasicScheduler", model=["pebble", 0], scheduler="normal", steps=3, denoise=0.5)
        graphs.fails(newest_server, graph, "KSampler", "noise level", "SIGMAS")

    @pytest.mark.parametrize("target", ["invert", "blend"])
    def test_nan_latent(self, newest_server: ComfyServer, target: str) -> None:
        from safetensors.torch import save_file

        broken = {
            "latent_tensor": torch.full((1, 4, 16, 16), float("nan")),
            "latent_format_version_0": torch.tensor([]),
        }
        save_file(broken, newest_server.base / "input" / "broken.latent")
        graph = graphs.blended() | {"invert": graphs.inverter(), "save_invert": graphs.save("invert")}
        graph["broken"] = graphs.node("LoadLatent", latent="broken.latent")
        graph[target]["inputs"]["latent" if target == "invert" else "source"] = ["broken", 0]
        if target == "blend":
            del graph["invert"], graph["save_invert"]
        else:
            graph = {key: graph[key] for key in (*graphs.base(), "broken", "invert", "save_invert")}
        node_type = graph[target]["class_type"]
        graphs.fails(newest_server, graph, node_type, "NaN", "DDIM Inverter" if target == "invert" else "Blend Step")

    @pytest.mark.parametrize("target", ["invert", "blend"])
    def test_model_of_unknown_prediction(self, server: ComfyServer, target: str) -> None:
        graph = graphs.blended() | {"invert": graphs.inverter(), "save_invert": graphs.save("invert")}
        graph["x0"] = graphs.node("ModelSamplingDiscrete", model=["pebble", 0], sampling="x0", zsnr=False)
        graph[target]["inputs"]["model"] = ["x0", 0]
        graphs.fails(server, graph, graph[target]["class_type"], "predicts by", "eps")

    def test_sigmas_the_wrong_way_round(self, newest_server: ComfyServer) -> None:
        graph = graphs.base() | {"invert": graphs.inverter(sigmas=["flip", 0]), "save": graphs.save("invert")}
        graph["sigmas"] = graphs.node("BasicScheduler", model=["pebble", 0], scheduler="normal", steps=4, denoise=1.0)
        graph["flip"] = graphs.node("FlipSigmas", sigmas=["sigmas", 0])
        graphs.fails(newest_server, graph, "RetraceDDIMInverter", "DDIM Inverter:", "Flip Sigmas")


def test_missing_weights_name_the_folder(newest_server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = tmp_path_factory.mktemp("nothing") / "pebble"
    with ComfyServer(newest_server.install, environment={"RETRACE_PEBBLE": str(nowhere)}) as server:
        graph = graphs.base() | {"sample": graphs.sampler(), "save": graphs.save("sample")}
        graphs.fails(server, graph, "RetraceLoadPebble", "Load Pebble:", str(nowhere), "missing")


def test_lpips_without_its_weights_names_the_file(newest_server: ComfyServer, tmp_path: Path) -> None:
    graph = _paste()
    del graph["show"]
    graph["report"] = graphs.node(
        "RetraceEditReport", edited=["paste", 0], source=["scene", 0], mask=["scene", 1], lpips=True
    )
    with ComfyServer(newest_server.install, environment={"TORCH_HOME": str(tmp_path)}) as server:
        graphs.fails(server, graph, "RetraceEditReport", "Edit Report: LPIPS", "alexnet", str(tmp_path), "download")


@pytest.mark.usefixtures("pebble")
def test_stopping_an_inversion_leaves_the_server_well(server: ComfyServer) -> None:
    graph = graphs.base() | {"invert": graphs.inverter(steps=1000, method="fixed_point"), "save": graphs.save("invert")}

    def stop(seconds: float) -> None:
        if seconds > 1:
            server.request("POST", "/interrupt", b"{}", "application/json")

    with pytest.raises(ComfyError, match="interrupted at node invert"):
        server.run(graph, on_wait=stop)
    graph["invert"] = graphs.inverter(steps=2)
    assert torch.isfinite(graphs.latent(server, server.run(graph), "save")).all()
