"""LPIPS through the ``lpips`` package, with weights from a file that is already there: nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.checks import check_image, check_same_size, describe, match_batch
from ..core.errors import InvalidFile, InvalidImage, InvalidSetting, require
from .quality import check_region

LpipsNet = Literal["alex", "vgg", "squeeze"]

# The package ships its own linear heads; these torchvision backbones are what it would fetch on first use.
_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
_SOURCE = "https://download.pytorch.org/models/"
_SMALLEST = 32  # AlexNet's strides leave nothing of less


def find_backbone(net: LpipsNet = "alex", path: str | os.PathLike[str] | None = None) -> Path:
    """The file with the backbone's ImageNet weights: ``path``, or torch hub's cache when it is not given.

    Raises:
        InvalidFile: there is no such file; the message names file, folder and where it comes from.
        InvalidSetting: ``net`` is none of alex, vgg, squeeze.
    """
    if net not in get_args(LpipsNet):
        raise InvalidSetting(f"LPIPS: got the network {net!r}, but one of {', '.join(_BACKBONES)} is needed.")
    file = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[net]
    if not file.is_file():
        raise InvalidFile(
            f"LPIPS: the weights of its '{net}' backbone are missing: no file '{file.name}' in the folder "
            f"'{file.parent}', and nothing is downloaded by itself. Download {_SOURCE}{_BACKBONES[net]} into that "
            "folder, or turn LPIPS off."
        )
    return file


@contextlib.contextmanager
def _quiet_construction() -> Iterator[None]:
    """The package builds its backbone with random numbers and deprecated arguments; keep both to itself."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        yield


def load_lpips(net: LpipsNet = "alex", path: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build LPIPS (Zhang et al. 2018, version 0.1) from local weights, on the CPU, in evaluation mode.

    Args:
        net: backbone. ``alex`` is the usual one for scores, ``vgg`` for losses.
        path: a torchvision checkpoint of that backbone; None looks in torch hub's cache.

    Raises:
        MissingPackage: lpips is not installed.
        InvalidFile: the weights are missing, unreadable or not those of the backbone.
    """
    lpips = require("lpips", "measure LPIPS")
    file = find_backbone(net, path)
    advice = f"Download {_SOURCE}{_BACKBONES[net]} again into the folder '{file.parent}'."
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers damage with RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise InvalidFile(f"LPIPS: '{file.name}' cannot be read as a torch checkpoint ({error}). {advice}") from error
    with _quiet_construction():
        # pnet_rand: random weights instead of the download that the package would start here.
        model: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # The package cuts torchvision's `features` into slices but keeps the numbers: slice2.3.weight is features.3.weight.
    backbone = model.get_submodule("net")
    names = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
    missing = [name for name in names.values() if not isinstance(stored, dict) or name not in stored]
    if missing:
        raise InvalidFile(
            f"LPIPS: '{file.name}' does not hold the '{net}' backbone: {len(missing)} of {len(names)} weights are "
            f"missing, '{missing[0]}' first. {advice}"
        )
    try:
        backbone.load_state_dict({name: stored[source] for name, source in names.items()})
    except RuntimeError as error:
        raise InvalidFile(f"LPIPS: '{file.name}' does not fit the '{net}' backbone ({error}). {advice}") from error
    return model.eval().requires_grad_(False)


def lpips_distance(image: Tensor, target: Tensor, model: nn.Module, region: Tensor | None = None) -> Tensor:
    """LPIPS distance ``[B]``: 0 for identical images, larger for less alike ones.

    Args:
        image, target: ``[B, H, W, 3]``, 0..1; one target may serve all.
        model: from :func:`load_lpips`.
        region: bool ``[B or 1, H, W]``. Outside of it the image is replaced by the target, so that only changes in the
            region count; the value is a mean over the whole image, so a small region gives a small number.

    Raises:
        InvalidImage: not images, different sizes, or smaller than 32x32.
    """
    image, target = check_image("image", image), check_image("target image", target)
    check_same_size("image", image, "the target image", target)
    target = match_batch(target, image.shape[0], "target image")
    return trusted_lpips(image, target, model, None if region is None else check_region(region, image))


def trusted_lpips(image: Tensor, target: Tensor, model: nn.Module, region: Tensor | None) -> Tensor:
    """:func:`lpips_distance` of images ``[B, H, W, 3]`` and a region ``[B, H, W]`` that were checked."""
    if min(image.shape[1:3]) < _SMALLEST:
        raise InvalidImage(
            f"image: got {describe(image)}, but LPIPS needs at least {_SMALLEST}x{_SMALLEST} pixels. Use a larger one, "
            "or turn LPIPS off."
        )
    target = target.to(image)
    if region is not None:
        image = torch.where(region.to(image.device)[..., None], image, target)
    like = next(model.parameters())
    rows = []
    with torch.no_grad():
        for one, other in zip(image, target, strict=True):  # one by one: a batch of large images need not fit
            pair = torch.stack([one, other]).movedim(-1, 1).to(like) * 2 - 1
            rows.append(model(pair[:1], pair[1:]).reshape(()))
    return torch.stack(rows).cpu().double()
