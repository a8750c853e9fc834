"""Trajectories on disk: safetensors with the fingerprint of the model and a format version.

Tensors ``sigmas`` and ``latents`` as in :class:`Trajectory`, and anything a method wants kept beside them (the
null-text embeddings of every step, say) as ``extra.<name>``. A file appears complete or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from ..core.errors import InvalidFile, InvalidSchedule, Remedy, require
from ..core.files import replace_file
from ..core.host import Parametrisation
from ..core.schedule import check_sigmas
from ..core.trajectory import Trajectory

FORMAT = "retrace-trajectory"
VERSION = 1
SUFFIX = ".safetensors"
EXTRA = "extra."

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)


def safe_name(name: object) -> str:
    """The file name for an inversion that a user called ``name``: the same, with ``.safetensors`` where it lacks it.

    Raises:
        InvalidFile: the name is empty, has path parts, a drive letter or characters that some system forbids, ends in a
            dot or space, is longer than 150 bytes, or is reserved on Windows (con, nul, com1, ...).
    """
    if not isinstance(name, str):
        raise InvalidFile(f"File name: got a {type(name).__name__}, but a text is needed.")
    stem = name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name
    advice = "Give a plain name such as 'my_photo'; the folder is chosen for you."
    if not stem.strip(" ."):
        raise InvalidFile(f"File name: got '{name}', which is empty. {advice}")
    if re.search(r"[/\\]", stem):
        raise InvalidFile(f"File name: got '{name}', which has path parts. {advice}")
    forbidden = sorted(set(re.findall(r'[<>:"|?*\x00-\x1f\x7f]', stem)))
    if forbidden:
        raise InvalidFile(f"File name: got {name!r}, which contains {', '.join(map(repr, forbidden))}. {advice}")
    if stem != stem.strip(" ") or stem.endswith("."):
        raise InvalidFile(f"File name: got '{name}', which begins or ends with a space, or ends with a dot. {advice}")
    if _RESERVED.fullmatch(stem.split(".")[0].rstrip(" ")):
        raise InvalidFile(f"File name: got '{name}', a name that Windows keeps for a device. {advice}")
    if len(stem.encode("utf-8", "surrogatepass")) > 150:
        raise InvalidFile(
            f"File name: got one of {len(stem)} characters, but at most 150 bytes are needed. Shorten it."
        )
    return stem + SUFFIX


def save_trajectory(trajectory: Trajectory, path: str | Path, extra: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``trajectory`` and the tensors ``extra`` to ``path``, replacing a file that is there; returns the path.

    The folder is made if needed; an interruption leaves the old file, or none.

    Raises:
        InvalidFile: a trajectory with NaN or of inconsistent shape, or a place that cannot be written.
    """
    target = Path(path)
    extra = dict(extra or {})
    _check(trajectory.sigmas, trajectory.latents, extra, f"This inversion cannot be saved to '{target.name}'")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fingerprint": trajectory.fingerprint,
        "parametrisation": trajectory.parametrisation,
        "method": trajectory.method,
        "latent_format": trajectory.latent_format,
        "report": json.dumps(trajectory.report),
    }
    tensors = {"sigmas": trajectory.sigmas, "latents": trajectory.latents}
    tensors |= {EXTRA + name: tensor for name, tensor in extra.items()}
    torch_format = require("safetensors.torch", "save inversions", "safetensors")
    data = torch_format.save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, metadata)
    try:
        replace_file(target, data)
    except OSError as error:
        raise InvalidFile(
            f"The inversion could not be written to '{target}': {error.strerror or error}. Check that there is space "
            "on the disk and that the folder may be written to; a file that was there before is unchanged."
        ) from error
    return target


def load_trajectory(path: str | Path) -> Trajectory:
    """Read a trajectory that :func:`save_trajectory` wrote.

    Whether it belongs to the model at hand is for :meth:`Trajectory.require_model`.

    Raises:
        InvalidFile: no such file, truncated or damaged, safetensors of something else, made by a newer version, NaN, or
            shapes that do not fit each other.
    """
    return load_with_extra(path)[0]


def load_with_extra(path: str | Path) -> tuple[Trajectory, dict[str, Tensor]]:
    """A trajectory and the further tensors of its file, read once; errors as in :func:`load_trajectory`."""
    path = Path(path)
    opener = require("safetensors", "load inversions")
    if not path.is_file():
        raise InvalidFile(f"There is no inversion file '{path}'. Check the name, or save the inversion again.")
    try:
        with opener.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InvalidFile(
                    f"'{path.name}' is a safetensors file of something else (a model, a LoRA, a latent?), not an "
                    "inversion.",
                    Remedy.SAVED_INVERSION,
                )
            _check_version(metadata.get("version", ""), path.name)
            # Copies, because the originals are views of the file and would keep it locked on Windows.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, opener.SafetensorError) as error:
        raise InvalidFile(
            f"'{path.name}' cannot be read as an inversion ({error}). It is truncated, damaged or of another kind: "
            "copy it again, or save the inversion again."
        ) from error
    broken = f"'{path.name}' is damaged"
    if "sigmas" not in tensors or "latents" not in tensors:
        _refuse(broken, "the tensors 'sigmas' and 'latents' are not both there")
    extra = {name.removeprefix(EXTRA): t for name, t in tensors.items() if name.startswith(EXTRA)}
    _check(tensors["sigmas"], tensors["latents"], extra, broken)
    parametrisation: Any = metadata.get("parametrisation")
    if parametrisation not in get_args(Parametrisation):
        _refuse(broken, f"it names the unknown model kind '{parametrisation}'")
    try:
        report = json.loads(metadata.get("report", "{}"))
    except json.JSONDecodeError:
        report = None
    if not isinstance(report, dict):
        _refuse(broken, "its report is not a JSON object")
    words = [metadata.get(name, "") for name in ("fingerprint", "method", "latent_format")]
    return Trajectory(
        tensors["sigmas"], tensors["latents"], parametrisation, words[0], words[1], report, words[2]
    ), extra


def _check_version(version: str, name: str) -> None:
    if not version.isdecimal() or int(version) < 1:
        _refuse(f"'{name}' is damaged", f"its format version is '{version}'")
    if int(version) > VERSION:
        raise InvalidFile(
            f"'{name}' was written by a newer Retrace (format version {version}; this one reads up to {VERSION}). "
            "Update Retrace, or save the inversion again with this version."
        )


def _check(sigmas: Tensor, latents: Tensor, extra: Mapping[str, Tensor], what: str) -> None:
    try:
        check_sigmas(sigmas)
    except InvalidSchedule as error:
        _refuse(what, str(error))
    if latents.ndim != 5 or len(latents) != len(sigmas) or latents.numel() == 0:
        _refuse(
            what,
            f"its latents have the shape {list(latents.shape)}, but [{len(sigmas)}, B, C, h, w] is needed, one for "
            f"each of its {len(sigmas)} noise levels",
        )
    for name, tensor in {"sigmas": sigmas, "latents": latents, **extra}.items():
        if name in ("sigmas", "latents") and not tensor.is_floating_point():
            _refuse(what, f"its {name} are {str(tensor.dtype).removeprefix('torch.')} numbers, but floats are needed")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            _refuse(what, f"its {name} hold NaN or infinity")


def _refuse(what: str, why: str) -> NoReturn:
    raise InvalidFile(f"{what}: {why.rstrip('.')}. Invert the image again and save that.")
