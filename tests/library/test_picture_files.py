"""Pictures and masks as files: what is read as it was, what is refused, and what a failure leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retrace.core.errors import InvalidFile, InvalidImage
from retrace.pictures.convert import to_picture
from retrace.pictures.files import read_image, read_mask, write_whole


def test_pictures_survive_the_round_trip(photo: Path, tmp_path: Path) -> None:
    image = read_image(photo)
    assert image.shape == (1, 24, 40, 3)
    to_picture(image[0]).save(tmp_path / "again.png")
    assert torch.equal(read_image(tmp_path / "again.png"), image)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA", "LA"])
def test_opaque_pictures_of_any_mode_are_read(photo: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    Image.open(photo).convert(mode).save(path)
    assert read_image(path).shape == (1, 24, 40, 3)


def test_lab_is_opaque_although_a_band_of_it_is_called_a(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 40, 40)).convert("LAB").save(tmp_path / "lab.tiff")
    levels = read_image(tmp_path / "lab.tiff")[0, 0, 0] * 255
    assert levels.tolist() == pytest.approx([200, 40, 40], abs=4)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert float(read_image(tmp_path / "deep.png").mean()) == pytest.approx(100 / 255, abs=1e-6)


def test_a_photo_is_turned_the_way_it_was_taken(photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (1, 40, 24, 3)


def test_transparent_pixels_are_refused(photo: Path, tmp_path: Path) -> None:
    picture = Image.open(photo).convert("RGBA")
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "holes.png")
    with pytest.raises(InvalidImage, match=r"holes\.png is RGBA.*Flatten"):
        read_image(tmp_path / "holes.png")
    with pytest.raises(InvalidImage, match=r"mask holes\.png is RGBA"):
        read_mask(tmp_path / "holes.png", (24, 40))


def test_damaged_files_are_named(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("half.png", "text.png"):
        with pytest.raises(InvalidFile, match=rf"{name} cannot be read as an image"):
            read_image(tmp_path / name)


def test_masks_are_checked(tmp_path: Path) -> None:
    def saved(name: str, values: Any) -> Path:
        Image.fromarray(np.asarray(values, dtype=np.uint8)).save(tmp_path / name)
        return tmp_path / name

    good = np.zeros((24, 40), np.uint8)
    good[4:8, 4:8] = 255
    mask = read_mask(saved("good.png", good), (24, 40))
    assert mask.shape == (1, 24, 40) and float(mask.sum()) == 16
    with pytest.raises(InvalidImage, match=r"40x24 pixels.*but 10x10"):
        read_mask(tmp_path / "good.png", (10, 10))
    with pytest.raises(InvalidImage, match="0 everywhere"):
        read_mask(saved("empty.png", good * 0), (24, 40))


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "file.bin", b"one")
    write_whole(tmp_path / "deep" / "file.bin", b"two")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file.bin"]
    assert (tmp_path / "deep" / "file.bin").read_bytes() == b"two"
    with pytest.raises(InvalidFile, match="cannot be written"):
        write_whole(tmp_path / "deep" / "file.bin" / "below.bin", b"")
