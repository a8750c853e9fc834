"""run.py: its command line, what it would install, and the files it reads and writes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import ImageFont

from retrace.blending.paste import paste_background
from retrace.cli.edit import EditPrompts, EditSettings
from retrace.cli.main import Job, _unused_card, example_job, pasted, working_size
from retrace.cli.terminal import Terminal
from retrace.pictures.contact_sheet import _wrapped
from retrace.pictures.fonts import drawable, font_for, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> ModuleType:
    """run.py as a module, with an environment folder of its own."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.VENV = tmp_path / ".venv"  # type: ignore[attr-defined]
    module.TEST_VENV = tmp_path / ".venv-test"  # type: ignore[attr-defined]
    return module


def standalone(*argv: str) -> int:
    from retrace.cli.main import main

    spec = importlib.util.spec_from_file_location("run_for_arguments", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return main(module.arguments().parse_args(argv))


# -- the environment


def test_run_needs_only_the_standard_library() -> None:
    lines = (ROOT / "run.py").read_text(encoding="utf-8").splitlines()
    imported = [line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))]
    assert set(imported) <= set(sys.stdlib_module_names)


def test_requirements_are_those_of_pyproject(run: Any) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = [line for line in run.requirements("edit") if not line.startswith("torch")]
    assert names == [n for n in extras["standalone"] if n != "torch"]
    assert set(run.requirements("test")) >= {*extras["test"], *project["dependencies"]}
    assert run.requirements("demo") == run.requirements("edit")


def test_the_standalone_environment_has_a_tested_torch_and_no_torchvision(run: Any) -> None:
    lines = run.requirements("demo")
    assert any(line.startswith("torch==") for line in lines)
    assert not any("torchvision" in line or "open_clip" in line or "lpips" in line for line in lines)


def test_the_pack_itself_pins_nothing(run: Any) -> None:
    listed = [r for r in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n") if r and r[0] != "#"]
    assert listed == run._list("dependencies")
    assert not any(sign in name for name in listed for sign in "=<>~!")


def test_an_environment_is_installed_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **_: object) -> int:
        calls.append(command)
        return 0

    monkeypatch.setattr(run.subprocess, "call", call)
    python = run.venv_python(run.VENV)
    python.parent.mkdir(parents=True)
    python.touch()
    assert not run.ready("demo")
    run.make_environment.__globals__["venv_python"] = lambda *_: python
    run.make_environment("demo")
    assert len(calls) == 1 and calls[0][1:4] == ["-m", "pip", "install"]
    assert run.ready("demo") and run.ready("edit") and not run.ready("test")
    run.make_environment("edit")
    assert len(calls) == 1
    run.TESTED["torch"] = ["torch==1.0"]  # another list: again
    assert not run.ready("demo")


def test_a_failed_installation_is_not_remembered(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    python = run.venv_python(run.VENV)
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(run, "venv_python", lambda *_: python)
    monkeypatch.setattr(run.subprocess, "call", lambda *_, **__: 1)
    with pytest.raises(run.SetupError, match="pip's message"):
        run.make_environment("demo")
    assert not run.ready("demo")
    assert run.main(["demo"]) == 2


def test_what_only_the_tests_need_does_not_reach_the_demo(run: Any) -> None:
    """A torchvision of another build than the torch beside it would stop the demo."""
    assert run.stamp("demo")[0].parent == run.stamp("edit")[0].parent == run.venv_of("demo") == run.VENV
    assert run.stamp("test")[0].parent == run.venv_of("test") == run.TEST_VENV != run.VENV


def test_the_command_is_passed_on_with_its_arguments(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(run, "inside", lambda command: False)
    monkeypatch.setattr(run, "make_environment", lambda command: None)

    def call(command: list[str], env: dict[str, str]) -> int:
        calls.append(command)
        environments.append(env)
        return 7

    monkeypatch.setattr(run.subprocess, "call", call)
    assert run.main(["test", "-k", "mask", "--help"]) == 7
    assert calls[0][-4:] == ["test", "-k", "mask", "--help"]
    assert environments[0]["PYTHONUTF8"] == "1" and environments[0].keys() >= os.environ.keys()


CHECKS = ["ruff", "ruff", "tools.check_types"]


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0, 0, 0), 0), ((0, 0, 1, 0), 1), ((0, 0, 0, 5), 5)])
def test_checks_come_before_pytest_and_count(
    run: Any, monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, ...], expected: int
) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], **_: object) -> int:
        calls.append(command)
        return statuses[len(calls) - 1]

    monkeypatch.setattr(run.subprocess, "call", call)
    assert run.run_tests([]) == expected
    assert [c[2] for c in calls] == [*CHECKS, "pytest"]


@pytest.mark.parametrize(
    ("argv", "before", "pytest_gets"),
    [
        ([], CHECKS, ["-m", "not slow", str(ROOT / "tests")]),
        (["--all"], CHECKS, [str(ROOT / "tests")]),
        (["-x", "-k", "mask"], [], ["-x", "-k", "mask"]),
        (["-x", "--all", "tests/library"], CHECKS, ["-x", "tests/library"]),
    ],
)
def test_slow_tests_run_when_asked_for(
    run: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], before: list[str], pytest_gets: list[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(run, "inside", lambda command: True)

    def call(command: list[str], **_: object) -> int:
        calls.append(command)
        return 0

    monkeypatch.setattr(run.subprocess, "call", call)
    assert run.main(["test", *argv]) == 0
    assert [c[2] for c in calls] == [*before, "pytest"]
    assert calls[-1][3:] == ["--rootdir", str(ROOT), *pytest_gets]


# -- the command line


@pytest.mark.parametrize(
    "argv", [[], ["paint"], ["edit"], ["edit", "a.png"], ["demo", "--steps", "many"], ["demo", "--host", "x"]]
)
def test_a_wrong_command_line_ends_with_2(run: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["missing.png", "--mask", "m.png", "--source", "a", "--prompt", "b"], "no file missing.png"),
        (["{photo}", "--mask", "m.png", "--source", "a", "--prompt", "b"], "no file m.png"),
        (["{photo}", "--mask", "{photo}", "--source", "a", "--prompt", "b"], "has colours"),
    ],
)
def test_bad_files_are_one_line_and_2(
    photo: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    argv = [part.format(photo=photo) for part in extra]
    assert standalone("edit", *argv, "--output", str(output)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not output.exists()


def test_an_own_image_needs_mask_and_words(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert standalone("demo", str(photo)) == 2
    assert "needs --mask" in capsys.readouterr().err
    assert standalone("demo", "--prompt", "a cat") == 2
    assert "go with an image of your own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--steps", "0"], "steps: got 0"), (["--strength", "2"], "strength: got 2"), (["--model", "nowhere"], "nowhere")],
)
def test_bad_settings_are_one_line_and_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    assert standalone("demo", "--output", str(tmp_path / "out"), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("retrace.cli.main.perform", fail)
    assert standalone("demo", "--output", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: There was not enough memory") and error.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):  # anything else is not hidden
        monkeypatch.setattr("retrace.cli.main.perform", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
        standalone("demo", "--output", str(tmp_path / "out"))


def test_an_nvidia_card_that_torch_cannot_use_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _unused_card(torch.device("cpu")) and not _unused_card(torch.device("mps"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not _unused_card(torch.device("cpu"))


def test_another_size_is_pasted_and_feathered_once() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    job = Job(torch.zeros(1, 64, 64, 3), mask, EditPrompts("", ""), EditSettings(feather=3.0), Path("unused"))
    expected = paste_background(torch.ones(1, 64, 64, 3), job.image, mask, 6.0)
    assert torch.equal(pasted(torch.ones(1, 32, 32, 3), job), expected)


# -- what the user sees


def test_progress_in_a_pipe_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.stage("invert")
    for step in (1, 2):
        terminal.steps(step, 2)
    terminal.say("done")
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = out.splitlines()
    assert len(lines) == 2 and "Inverting" in lines[0] and "2 of 2" in lines[0]
    assert lines[1] == "done"


def test_progress_on_a_terminal_rewrites_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal = Terminal()
    terminal.stage("invert")
    for step in (1, 3):
        terminal.steps(step, 5)
    terminal.say("done")
    out = capsys.readouterr().out
    assert out.count("\r") == 2 and out.count("\n") == 2
    assert "3 of 5" in out.split("\n")[0] and out.endswith("\ndone\n")


def test_letters_that_no_font_has_become_question_marks() -> None:
    own = ImageFont.load_default(14)
    assert drawable("a red circle, “a star”", own) == "a red circle, “a star”"
    assert drawable("빨간 원 a", own) == "?? ? a"
    assert missing("\U0010fffe", own) == {"\U0010fffe"}


def test_a_font_of_the_system_is_used_where_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        wide = ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("no DejaVu Sans here")
    text = "κόκκινος κύκλος ⚙"
    assert missing(text, ImageFont.load_default(14)) and not missing(text, wide)
    monkeypatch.setattr("retrace.pictures.fonts._WIDE", ("no such font.ttf", "DejaVuSans.ttf"))
    assert font_for(text, 14).getname() == wide.getname()  # type: ignore[union-attr]
    assert font_for("a red circle", 14).getname() == ImageFont.load_default(14).getname()  # type: ignore[union-attr]


def test_long_words_are_broken() -> None:
    font = ImageFont.load_default(14)
    rows = _wrapped("a " + "x" * 100 + " b", font, 200)
    assert "".join(rows).replace(" ", "") == "a" + "x" * 100 + "b"
    assert all(font.getlength(row) <= 200 for row in rows) and len(rows) > 3


# -- the example


def test_the_example_is_a_red_circle_that_becomes_a_blue_square() -> None:
    job = example_job(Path("unused"))
    assert "red circle" in str(job.prompts.source) and "blue square" in job.prompts.target
    assert job.image.shape == (1, 128, 128, 3) and job.mask.shape == (1, 128, 128)
    assert 0.02 < float(job.mask.mean()) < 0.4


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((3000, 4000), 512, (384, 512)),
        ((128, 128), 128, (128, 128)),
        ((100, 1000), 128, (16, 128)),
        ((9, 999), 64, (8, 64)),
    ],
)
def test_working_sizes_fit_the_model(size: tuple[int, int], longest: int, expected: tuple[int, int]) -> None:
    assert working_size(*size, longest, 8) == expected
