"""Checks that need ComfyUI's own Python: each runs a few lines inside it, with the pack imported as ComfyUI does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from installs import INSTALLS, install_or_skip

ROOT = Path(__file__).parents[2]
Run = Callable[[str], str]
PREAMBLE = f"""
import sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import importlib.util
spec = importlib.util.spec_from_file_location("pack", r"{ROOT / "__init__.py"}")
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
import torch
"""


@pytest.fixture(params=list(INSTALLS))
def inside(request: pytest.FixtureRequest) -> Run:
    install = install_or_skip(request.param)

    def run(code: str) -> str:
        done = subprocess.run(
            [str(install.python), "-c", PREAMBLE + code], cwd=install.path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_out_of_memory_says_what_to_do(inside: Run) -> None:
    out = inside("""
import comfy.model_management
from pack.nodes._errors import reports_errors
from pack.retrace.core.errors import RetraceError

def failing(error):
    @reports_errors("Blend Step")
    def execute():
        raise error
    try:
        execute()
    except Exception as caught:
        core = isinstance(caught, comfy.model_management.OOM_EXCEPTION)
        print(type(caught).__name__, isinstance(caught, RetraceError), core, str(caught))

failing(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
failing(MemoryError())
failing(RuntimeError("MPS backend out of memory (MPS allocated: 17.1 GB, max allowed: 18.1 GB)"))
failing(RuntimeError("HIP out of memory. Tried to allocate 2 GiB"))
failing(RuntimeError("CUDA error: out of memory"))
failing(RuntimeError("shapes differ"))
""")
    lines = out.splitlines()[-7:]
    for line in lines[:6]:
        assert line.startswith("OutOfMemory True True Blend Step: out of memory"), out
        assert "smaller image" in line
    assert lines[6] == "RuntimeError False False shapes differ"


# Those whose words hold in a graph as well; a new one belongs here or into WIRES.
WITHOUT_A_WIRE = {"SCALE_IMAGE"}


def test_every_remedy_has_a_node_or_deliberately_none(inside: Run) -> None:
    out = inside("""
from pack.nodes._errors import WIRES, reports_errors, text_of
from pack.retrace.core.errors import InvalidImage, Remedy, RetraceError

print(sorted(remedy.name for remedy in Remedy if remedy not in WIRES))
print(all(words.strip() == words and words.endswith(".") for words in WIRES.values()))

@reports_errors("Blend Step")
def execute(remedy):
    raise InvalidImage("It is grey.", remedy)

for remedy in (None, *Remedy):
    try:
        execute(remedy)
    except InvalidImage as error:
        words = "" if remedy is None else " " + WIRES.get(remedy, remedy.value)
        assert str(error) == "Blend Step: It is grey." + words, str(error)
        print(type(error).__name__)
""")
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("["))  # after what core prints
    without, sentences, *caught = lines[first:]
    assert without == str(sorted(WITHOUT_A_WIRE)) and sentences == "True"
    assert set(caught) == {"InvalidImage"}


def test_interrupts_pass_and_leave_nothing_behind(inside: Run) -> None:
    out = inside("""
import comfy.model_management
from pack.retrace.blending.blend import Blend
from pack.retrace.hosts.comfyui.patches.blend import _BlendPatch

patch = _BlendPatch(Blend(torch.zeros(1, 4, 8, 8), torch.ones(1, 8, 8), "eps"))
guider = object()

def interrupted(*args, **kwargs):
    assert patch.runs
    raise comfy.model_management.InterruptProcessingException()

try:
    patch.sample(interrupted, guider, torch.tensor([1.0, 0.0]), {}, None, torch.zeros(1, 4, 8, 8))
except comfy.model_management.InterruptProcessingException:
    print("passed", len(patch.runs))
""")
    assert out.splitlines()[-1] == "passed 0"


def test_a_program_that_calls_drag_points_itself_gets_its_error(inside: Run) -> None:
    out = inside("""
from pack.nodes.drag_points import DragPointsNode
from pack.retrace.core.errors import InvalidPoints

try:
    DragPointsNode.execute(torch.zeros(1, 8, 8, 3), "")
except InvalidPoints as error:
    print(error)
""")
    assert out.splitlines()[-1].startswith("Drag Points: there are no points."), out


def test_loading_the_nodes_imports_nothing_heavy(inside: Run) -> None:
    """ComfyUI waits for this at every start: no package that it has not loaded itself, and none of our host."""
    out = inside("""
import comfy.samplers, comfy_api.latest
before = set(sys.modules)
import pack.nodes
new = {name for name in set(sys.modules) - before}
print(sorted({name.split(".")[0] for name in new} - {"pack"} - set(sys.stdlib_module_names)))
print([name for name in new if name.startswith(("pack.retrace.hosts.", "pack.retrace.training.", "pack.retrace.cli."))])
""")
    assert out.splitlines()[-2:] == ["[]", "[]"], out
