"""`run.py demo` through a real ComfyUI, and the same edit through diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from installs import install_or_skip
from PIL import Image

from retrace.errors import RetraceError
from retrace.hosts.comfyui_server import ComfyServer
from retrace.standalone import main


def demo(monkeypatch: pytest.MonkeyPatch, output: Path, *more: str) -> dict[str, object]:
    import importlib.util

    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("run_for_arguments", root / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("COMFYUI_PATH", str(install_or_skip("newest").path))
    assert main(module.arguments().parse_args(["demo", "--steps", "4", "--output", str(output), *more])) == 0
    report: dict[str, object] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


def picture(folder: Path, name: str) -> np.ndarray:
    return np.array(Image.open(folder / f"{name}.png").convert("RGB")).astype(int)


def test_the_demo_is_the_same_edit_in_both_hosts(
    pebble: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    report = demo(monkeypatch, tmp_path / "comfyui", "--host", "comfyui")
    assert "Editing through ComfyUI" in capsys.readouterr().out
    assert str(report["host"]).startswith("ComfyUI")
    assert demo(monkeypatch, tmp_path / "diffusers", "--host", "diffusers")["host"] == "diffusers"
    assert "Editing with diffusers: Pebble" in capsys.readouterr().out
    for name in ("source", "mask", "reconstruction", "edit"):
        one, other = (picture(tmp_path / host, name) for host in ("comfyui", "diffusers"))
        # One level apart because ComfyUI cuts off what the other rounds when it goes to 8 bits.
        assert abs(one - other).max() <= 2, name


def test_with_little_strength_the_demo_is_the_same_edit_too(
    pebble: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six steps are no divisor of 1000: the schedule then has seven, and both hosts count from its end."""
    pytest.importorskip("diffusers")
    for host in ("comfyui", "diffusers"):
        demo(monkeypatch, tmp_path / host, "--host", host, "--steps", "6", "--strength", "0.5", "--seed", "7")
        if host == "comfyui":
            lines = capsys.readouterr().out.splitlines()
            assert "  DDIM Inverter ..." in lines, "no line for the node that works"
    for name in ("reconstruction", "edit"):
        one, other = (picture(tmp_path / host, name) for host in ("comfyui", "diffusers"))
        assert abs(one - other).max() <= 2, name


def test_a_comfyui_that_dies_hands_over_to_diffusers(
    pebble: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    run = ComfyServer.run

    def shot(server: ComfyServer, *args: object, **more: object) -> object:
        assert server._process is not None
        server._process.kill()
        return run(server, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ComfyServer, "run", shot)
    assert demo(monkeypatch, tmp_path / "out")["host"] == "diffusers"
    out = capsys.readouterr().out
    assert "That ComfyUI could not do it: ComfyUI" in out and "its process ended with status" in out
    assert "So diffusers makes the edit." in out


def test_an_own_picture_keeps_its_size_and_its_background(
    pebble: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    mask = np.zeros((150, 200), np.uint8)
    mask[40:90, 60:120] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ("--mask", str(tmp_path / "mask.png"), "--source", "a red circle", "--prompt", "a blue square")
    demo(monkeypatch, tmp_path / "out", str(tmp_path / "photo.png"), *words, "--host", "comfyui", "--strength", "0.5")
    edited = picture(tmp_path / "out", "edit")
    assert np.array_equal(edited[mask == 0], noise[mask == 0])
    assert not np.array_equal(edited, noise)


def test_a_comfyui_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    from retrace.hosts.comfyui_install import ComfyError, find_comfyui

    with pytest.raises((ComfyError, RetraceError), match="COMFYUI_PATH"):
        find_comfyui()
