"""The contract suite on the ComfyUI host, and both hosts beside each other on the same weights."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from installs import INSTALLS, ROOT, install_or_skip

from retrace.core.sampling import sample_ddim
from retrace.hosts.diffusers import DiffusersHost
from retrace.models.pebble.scenes import heldout, render_batch
from tools.comfyui.server import ComfyInstall

PROMPTS = ("a red circle on sand", "")
LEVELS = (13.0, 3.0, 0.5, 0.05)
STEPS, GUIDANCE = 20, 5.0


@pytest.fixture(params=list(INSTALLS))
def install(request: pytest.FixtureRequest) -> ComfyInstall:
    return install_or_skip(request.param)


def lend_pytest(folder: Path) -> Path:
    """Copy this environment's pytest: pure Python, so that any ComfyUI can run it without being changed."""
    for name in ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(next(iter(spec.submodule_search_locations)), folder / name, ignore=skip)
    return folder


def inside(install: ComfyInstall, arguments: list[str], extra_path: Path, timeout: float) -> str:
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(install.path),
        "RETRACE_HOSTS": "comfyui",
        "PYTHONPATH": os.pathsep.join([str(extra_path), str(install.path), str(ROOT)]),
    }
    done = subprocess.run(
        [str(install.python), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_contract_suite_passes_inside_comfyui(install: ComfyInstall, tmp_path: Path) -> None:
    arguments = ["-m", "pytest", "tests/contract", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    out = inside(install, arguments, lend_pytest(tmp_path / "lent"), timeout=600)
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None and int(passed.group(1)) >= 60, out[-2000:]


COMFY_SIDE = f"""
import sys
sys.argv, (latents, images, out) = ["main.py", "--cpu"], sys.argv[1:]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from retrace.hosts.comfyui import ComfyHost, load_pebble
from retrace.core.sampling import sample_ddim
with torch.inference_mode():
    host = ComfyHost(*load_pebble())
    x, pictures = torch.load(latents), torch.load(images)
    conds = {{str(i): host.encode_text(p) for i, p in enumerate({PROMPTS!r})}}
    def method(model, latent, c):
        found = [model.denoised(latent * s, s, c["0"]) for s in {LEVELS!r}]
        sigmas = host.sigmas("ddim_uniform", {STEPS})
        return [c["0"].embedding, *found, sample_ddim(model, latent * sigmas[0], sigmas, c["0"], c["1"], {GUIDANCE})]
    results = host.run(x, conds, method)
    encoded = host.encode_image(pictures)
    torch.save([r.clone() for r in (*results, encoded, host.decode_latent(encoded))], out)
"""


def test_both_hosts_give_the_same_result(install: ComfyInstall, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = render_batch(heldout(2)).movedim(1, -1).contiguous()
    files = [tmp_path / name for name in ("latents.pt", "images.pt", "out.pt")]
    torch.save(x, files[0])
    torch.save(pictures, files[1])
    inside(install, ["-c", COMFY_SIDE, *map(str, files)], tmp_path, timeout=300)

    host = DiffusersHost.load(None, device="cpu")
    conds = {str(i): host.encode_text(p) for i, p in enumerate(PROMPTS)}

    def method(model, latent, c):  # type: ignore[no-untyped-def]
        found = [model.denoised(latent * s, s, c["0"]) for s in LEVELS]
        sigmas = host.sigmas("ddim_uniform", STEPS)
        return [c["0"].embedding, *found, sample_ddim(model, latent * sigmas[0], sigmas, c["0"], c["1"], GUIDANCE)]

    encoded = host.encode_image(pictures)
    ours = [*host.run(x, conds, method), encoded, host.decode_latent(encoded)]
    for name, a, b in zip(
        ("text", *(f"denoised at {s}" for s in LEVELS), "guided sample", "encoded", "decoded"),
        ours,
        torch.load(files[2]),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-3, f"{name}: {(a - b).abs().max():.2e}"
