"""A graph without this pack's nodes gives the same bits with the pack, without it, and after its nodes have run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import graphs
import pytest
import torch
from installs import INSTALLS, ROOT, install_or_skip, pebble_environment

from tools.comfyui.server import ComfyInstall, ComfyServer

# The smallest UNet that core's own loader recognises (as SD 2, whose text width core's Lotus node can feed), with
# weights from a seed.
MAKE_UNET = """
import sys
target = sys.argv[1]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, safetensors.torch
import comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1],
              transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=1024,
              use_spatial_transformer=True, use_linear_in_transformer=True, num_head_channels=64, legacy=False)
unet = UNetModel(**config, operations=comfy.ops.disable_weight_init, dtype=torch.float16, device="cpu")
generator = torch.Generator().manual_seed(0)
weights = {}
for name, value in unet.state_dict().items():
    scale = 0.5 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
    weights["model.diffusion_model." + name] = (torch.randn(value.shape, generator=generator) * scale).half()
safetensors.torch.save_file(weights, target)
"""


def _core_graph() -> graphs.Graph:
    sampler = graphs.sampler(steps=3, positive=["cond", 0], negative=["cond", 0], latent_image=["empty", 0])
    return {
        "unet": graphs.node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "cond": graphs.node("LotusConditioning"),
        "empty": graphs.node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": sampler | {"inputs": sampler["inputs"] | {"model": ["unet", 0]}},
        "save": graphs.save("sample"),
    }


def _add_our_nodes(graph: graphs.Graph) -> graphs.Graph:
    graph = dict(graph)
    graph["mask"] = graphs.solid_mask(1.0, 64, 32)
    graph["none"] = graphs.solid_mask(0.0, 64, 64)
    graph["half"] = graphs.node("MaskComposite", destination=["none", 0], source=["mask", 0], x=0, y=0, operation="add")
    graph["blend"] = graphs.blend(model=["unet", 0], mask=["half", 0], source=["empty", 0])
    inputs = graph["sample"]["inputs"] | {"model": ["blend", 0]}
    graph["blended"] = graphs.node("KSampler", **inputs)
    graph["save_blended"] = graphs.save("blended")
    graph["invert"] = graphs.inverter(
        model=["unet", 0], positive=["cond", 0], latent=["sample", 0], steps=1, method="spdinv", max_iterations=1
    )
    graph["save_invert"] = graphs.save("invert")
    return graph


@pytest.fixture(scope="module", params=list(INSTALLS))
def install(request: pytest.FixtureRequest) -> ComfyInstall:
    return install_or_skip(request.param)


def test_core_graphs_keep_their_bits(install: ComfyInstall, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    subprocess.run([str(install.python), "-c", MAKE_UNET, str(weights)], cwd=install.path, check=True)
    results: dict[str, torch.Tensor] = {}
    for name, pack in (("without", None), ("with", ROOT)):
        models = tmp_path / name / "models" / "diffusion_models"
        models.mkdir(parents=True)
        (models / weights.name).write_bytes(weights.read_bytes())
        with ComfyServer(install, pack, base=tmp_path / name, environment=pebble_environment()) as server:
            registered = [key for key in server.object_info() if key.startswith("Retrace")]
            assert bool(registered) == (pack is not None)
            results[name] = graphs.latent(server, server.run(_core_graph()), "save")
            if pack is not None:
                first = server.run(_add_our_nodes(_core_graph()))
                assert not torch.equal(graphs.latent(server, first, "save_blended"), results[name])
                again = _core_graph()  # our nodes deleted again; another seed in between empties the cache
                again["sample"]["inputs"]["seed"] = 99
                server.run(again)
                again["sample"]["inputs"]["seed"] = 5
                results["after"] = graphs.latent(server, server.run(again), "save")
    assert results["without"].std() > 0.1
    assert torch.equal(results["without"], results["with"])
    assert torch.equal(results["without"], results["after"])
