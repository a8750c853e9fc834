"""Images and masks as files: read with clear errors, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..core.checks import check_mask
from ..core.errors import InvalidFile, InvalidImage
from ..core.files import replace_file
from .convert import to_tensor

_GREY = 8.5  # levels of 255 that the channels of a grey image may be apart: a JPEG rounds them


def read_image(path: Path) -> Tensor:
    """The image in ``path`` as ``[1, H, W, 3]`` in 0..1, turned the way its EXIF entry says.

    Raises:
        InvalidFile: no such file, or not a readable image.
        InvalidImage: it has transparent pixels, which a model cannot see.
    """
    picture = _open(path)
    if _transparent(picture):
        raise InvalidImage(
            f"{path.name} is {picture.mode} and has transparent pixels, but an opaque RGB image is needed. Flatten "
            "it onto a background in your image editor and save it again. If its transparency is the mask, save that "
            "as a grey image of its own."
        )
    return to_tensor(picture)[None]


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """The mask in ``path`` as ``[1, H, W]`` in 0..1, white = edit; ``size`` is the (height, width) that it must have.

    Raises:
        InvalidFile: no such file, or not a readable image.
        InvalidImage: another size, transparency, colours, or nothing white in it.
    """
    picture = _open(path)
    if _transparent(picture):
        raise InvalidImage(
            f"The mask {path.name} is {picture.mode} and has transparent pixels, so it is not clear what selects. Save "
            "it as an opaque grey image: white where the photo should change, black elsewhere."
        )
    image = to_tensor(picture)
    if float((image.amax(dim=-1) - image.amin(dim=-1)).max()) > _GREY / 255:
        raise InvalidImage(
            f"The mask {path.name} has colours, but a grey image is needed: white where the photo should change, "
            "black elsewhere. Was the photo given as the mask?"
        )
    return check_mask(f"mask {path.name}", image[None, ..., 0], size)


def _transparent(picture: Image.Image) -> bool:
    # By its mode, since LAB has a band called A as well; _open makes RGBA of all that hold transparency.
    return picture.mode == "RGBA" and bool((np.asarray(picture)[..., 3] < 255).any())


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise InvalidFile(f"There is no file {path}. Check the path.")
    try:
        with Image.open(path) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidFile(
            f"{path.name} cannot be read as an image ({error}). It may be damaged or in a format this program does not "
            "know: open it in an image editor and save it as PNG."
        ) from error
    if picture.mode.startswith("I"):  # 16 bits a channel, which convert() would clip
        picture = Image.fromarray((np.array(picture, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if picture.mode == "F":
        raise InvalidFile(
            f"{path.name} holds floating-point values of unknown range. Save it with 8 or 16 bits a channel."
        )
    if picture.mode in ("P", "PA", "LA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it is there completely or not at all.

    Raises:
        InvalidFile: the folder cannot be made or written to.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise InvalidFile(
            f"{path} cannot be written ({error.strerror or error}). Choose another folder with --output, or make room."
        ) from error
