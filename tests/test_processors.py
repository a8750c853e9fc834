"""The tests of numbers once more, computed as other processors and other numbers of threads compute them.

Each setting is a pytest of its own, because torch reads them when it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "SSE4.1 in oneDNN": {"DNNL_MAX_CPU_ISA": "SSE41"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def as_this_run(setting: dict[str, str]) -> bool:
    """Whether it would only repeat what this run does anyway."""
    return setting.get("ATEN_CPU_CAPABILITY") == torch.backends.cpu.get_cpu_capability().lower() or setting.get(
        "OMP_NUM_THREADS"
    ) == str(torch.get_num_threads())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
def test_numbers_hold_on_another_processor(name: str, tmp_path: Path) -> None:
    if as_this_run(SETTINGS[name]):
        pytest.skip("this is how this run computes")
    if name == "AVX2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    arguments = ["-q", "-m", "rounding", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}", "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, "RETRACE_HOSTS": "diffusers", **SETTINGS[name]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
