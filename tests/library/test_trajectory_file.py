"""Trajectories survive the disk, and files that are not one are told apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from retrace.core.errors import InvalidFile, TrajectoryMismatch
from retrace.core.trajectory import Trajectory
from retrace.inversion.files import load_trajectory, load_with_extra, safe_name, save_trajectory

METADATA = {
    "format": "retrace-trajectory",
    "version": "1",
    "fingerprint": "f00d",
    "parametrisation": "eps",
    "method": "ddim",
    "report": "{}",
}


def example() -> Trajectory:
    latents = torch.randn(4, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    report: dict[str, float | int | str | list[float] | list[int]] = {
        "evaluations": 12,
        "latent_psnr": 41.5,
        "method": "x",
        "residuals": [1e-6, 2e-6],
        "iterations": [3, 4],
    }
    return Trajectory(torch.tensor([9.0, 3.0, 1.0, 0.0]), latents, "flow", "f00d", "fixed_point", report)


def write(path: Path, sigmas: torch.Tensor | None = None, latents: torch.Tensor | None = None, **changes: str) -> Path:
    tensors = {
        "sigmas": torch.tensor([2.0, 1.0, 0.0]) if sigmas is None else sigmas,
        "latents": torch.zeros(3, 1, 4, 2, 2) if latents is None else latents,
    }
    save_file(tensors, str(path), {**METADATA, **changes})
    return path


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "photo.safetensors"
    original = example()
    extra = {"negative": torch.randn(3, 1, 7, 6).half(), "count": torch.tensor([1, 2])}
    assert save_trajectory(original, path, extra) == path
    loaded = load_trajectory(path)
    assert torch.equal(loaded.sigmas, original.sigmas) and torch.equal(loaded.latents, original.latents)
    assert (loaded.parametrisation, loaded.fingerprint, loaded.method) == ("flow", "f00d", "fixed_point")
    assert loaded.report == original.report
    back = load_with_extra(path)[1]
    assert back.keys() == extra.keys()
    assert all(torch.equal(back[name], extra[name]) and back[name].dtype == extra[name].dtype for name in extra)
    assert os.listdir(path.parent) == ["photo.safetensors"]


def test_saving_again_replaces_and_views_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    save_trajectory(example(), path)
    loaded = load_trajectory(path)
    view = Trajectory(loaded.sigmas[1:], loaded.latents[1:, :1], "eps", "beef", "ddim")
    save_trajectory(view, path)  # over the file that its tensors came from
    assert torch.equal(load_trajectory(path).latents, view.latents)
    assert load_with_extra(path)[1] == {}


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.safetensors"
    save_trajectory(example(), path)
    before = path.read_bytes()
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(*_args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("retrace.core.files.os.replace", fail)
        expected = InvalidFile if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            save_trajectory(Trajectory(torch.tensor([1.0, 0.0]), torch.zeros(2, 1, 1, 1, 1), "eps", "", "ddim"), path)
        if expected is InvalidFile:
            assert "No space left on device" in str(caught.value) and "unchanged" in str(caught.value)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["photo.safetensors"]


def test_a_broken_trajectory_is_not_saved(tmp_path: Path) -> None:
    good = example()
    latents = good.latents.clone()
    latents[1, 0, 0, 0, 0] = float("nan")
    for sigmas, bad, message in [
        (good.sigmas, latents, "latents hold NaN"),
        (good.sigmas, good.latents[:3], r"shape \[3, 2, 4, 3, 5\], but \[4, B, C, h, w\]"),
        (good.sigmas.flip(0), good.latents, "turn them round"),
    ]:
        with pytest.raises(InvalidFile, match=f"cannot be saved to 'x.safetensors'.*{message}"):
            save_trajectory(Trajectory(sigmas, bad, "eps", "", "ddim"), tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InvalidFile, match="There is no inversion file"):
            load_trajectory(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "photo.safetensors"
    save_trajectory(example(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidFile, match=r"'photo\.safetensors' cannot be read.*truncated, damaged"):
        load_trajectory(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(InvalidFile, match="cannot be read as an inversion"):
        load_trajectory(picture)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_up.weight": torch.zeros(2, 2)}, str(lora))
    with pytest.raises(InvalidFile, match=r"'lora\.safetensors' is a safetensors file of something else"):
        load_trajectory(lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "written by a newer Retrace .format version 2; this one reads up to 1"),
        ({"version": "one"}, "format version is 'one'"),
        ({"version": "0"}, "format version is '0'"),
        ({"parametrisation": "x0"}, "unknown model kind 'x0'"),
        ({"report": "{not json"}, "report is not a JSON object"),
        ({"report": json.dumps([1])}, "report is not a JSON object"),
        ({"sigmas": torch.tensor([0.0, 1.0, 2.0])}, "turn them round"),
        ({"sigmas": torch.tensor([2, 1, 0])}, "sigmas are int64 numbers"),
        ({"latents": torch.zeros(2, 1, 4, 2, 2)}, r"shape \[2, 1, 4, 2, 2\], but \[3, B, C, h, w\]"),
        ({"latents": torch.zeros(3, 4, 2, 2)}, r"shape \[3, 4, 2, 2\]"),
        ({"latents": torch.zeros(3, 0, 4, 2, 2)}, r"shape \[3, 0, 4, 2, 2\]"),
        ({"latents": torch.full((3, 1, 4, 2, 2), float("inf"))}, "latents hold NaN or infinity"),
    ],
)
def test_contents_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "photo.safetensors", **changes)
    with pytest.raises(InvalidFile, match=r"photo\.safetensors.*" + message):
        load_trajectory(path)


def test_missing_tensors_and_broken_extras(tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    save_file({"sigmas": torch.tensor([1.0, 0.0])}, str(path), METADATA)
    with pytest.raises(InvalidFile, match="'sigmas' and 'latents' are not both there"):
        load_trajectory(path)
    with pytest.raises(InvalidFile, match="negative hold NaN"):
        save_trajectory(example(), path, {"negative": torch.tensor([float("nan")])})


def test_another_model_is_refused_when_it_matters(tmp_path: Path) -> None:
    loaded = load_trajectory(save_trajectory(example(), tmp_path / "photo.safetensors"))
    loaded.require_model("f00d")
    with pytest.raises(TrajectoryMismatch, match=r"f00d.*beef.*invert again"):
        loaded.require_model("beef")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        ".safetensors",
        "a/b",
        "../a",
        "a\\b",
        "C:a",
        "C:\\a",
        "/etc/a",
        "a:b",
        "a*",
        "a?",
        'a"',
        "a|b",
        "a\x00",
        "a\n",
        " a",
        "a ",
        "a.",
        "a .safetensors",
        "con",
        "NUL",
        "com1",
        "LPT9.safetensors",
        "aux.b",
        "COM¹",
        "CONIN$",
        "x" * 151,
        "ä" * 80,
        None,
        7,
    ],
)
def test_names_with_path_parts_or_reserved_are_refused(name: object) -> None:
    with pytest.raises(InvalidFile, match="File name: got"):
        safe_name(name)


@pytest.mark.parametrize(
    "name", ["photo", "my photo (2)", "v1.5", "Köln", "写真", ".hidden", "console", "com10", "a..b"]
)
def test_plain_names_pass(name: str) -> None:
    assert safe_name(name) == name + ".safetensors"
    assert safe_name(name + ".safetensors") == name + ".safetensors"
