"""Checks of what arrives from outside: every message names the input, what arrived, what is needed and what to do.

Nothing is repaired silently. The one liberty: resizing filters overshoot a little, so values up to :data:`OVERSHOOT`
beyond 0..1 are clamped, as saving the image would do; anything further off is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InvalidImage, InvalidSchedule, InvalidSetting, Remedy

OVERSHOOT = 0.25
"""How far bicubic and Lanczos resizing may leave 0..1 (a sharp white corner on black reaches about 1.2)."""


def describe(value: object) -> str:
    """Say what arrived, for an error message: shape and type of a tensor, class of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, dict):
        return f"a dict with the keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}"


def _tensor(name: str, value: object, needed: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    hint = " Take its 'samples' entry." if isinstance(value, dict) and "samples" in value else ""
    raise InvalidImage(f"{name}: got {describe(value)}, but {needed} is needed.{hint}")


def _not_empty(name: str, value: Tensor, needed: str) -> None:
    if value.numel() == 0:
        raise InvalidImage(
            f"{name}: got {describe(value)}, which holds no values, but {needed} is needed. "
            "Check the step before it: it gave an empty batch or an image of size 0."
        )


def _finite(name: str, value: Tensor, cause: str) -> None:
    bad = ~torch.isfinite(value)
    if bad.any():
        count = int(bad.sum())
        raise InvalidImage(
            f"{name}: {count} of {value.numel()} values of {describe(value)} are NaN or infinite, "
            f"but finite values are needed. {cause}"
        )


def _unit_range(name: str, value: Tensor, remedy: Remedy) -> Tensor:
    low, high = value.min().item(), value.max().item()
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise InvalidImage(
            f"{name}: values from {low:.4g} to {high:.4g} arrived in {describe(value)}, but 0 to 1 is needed.",
            remedy,
        )
    return value if low >= 0 and high <= 1 else value.clamp(0, 1)


def check_image(name: str, image: object) -> Tensor:
    """Return ``image`` [B,H,W,3] (float, 0..1) when it is one.

    The tensor comes back as it is, except that an overshoot of at most :data:`OVERSHOOT` is clamped.

    Raises:
        InvalidImage: not a tensor, no batch dimension, one or four channels, channels first, integer type, no pixels,
            NaN or infinity, values outside 0..1.
    """
    needed = "an image batch [B, H, W, 3] with float values 0..1"
    image = _tensor(name, image, needed)
    arrived = f"{name}: got {describe(image)}, but {needed} is needed."
    if image.ndim == 3:
        raise InvalidImage(arrived, Remedy.MASK_TO_IMAGE)
    if image.ndim != 4:
        raise InvalidImage(arrived)
    channels = image.shape[-1]
    if channels == 4:
        raise InvalidImage(arrived, Remedy.DROP_ALPHA)
    if channels == 1:
        raise InvalidImage(arrived, Remedy.REPEAT_GREY)
    if channels != 3:
        first = (
            " The channels seem to come first: move them last (image.movedim(1, -1))." if image.shape[1] == 3 else ""
        )
        raise InvalidImage(f"{arrived} There are {channels} channels.{first}")
    if not image.is_floating_point():
        raise InvalidImage(f"{arrived} Divide 8-bit values by 255 first (image.float() / 255).")
    _not_empty(name, image, needed)
    _finite(
        name,
        image,
        "Look at the step that made the image: a VAE in half precision is the usual cause (decode in 32-bit).",
    )
    return _unit_range(name, image, Remedy.SCALE_IMAGE)


def check_mask(name: str, mask: object, size: tuple[int, int] | None = None, allow_empty: bool = False) -> Tensor:
    """Return ``mask`` [B,H,W] (float 0..1, 1 = edit) when it is one; a bool mask becomes float.

    Args:
        size: the (height, width) that the mask must have, usually that of the image.
        allow_empty: accept a mask that selects nothing at all.

    Raises:
        InvalidImage: not a tensor, two or four dimensions, integer type, no pixels, NaN, values outside 0..1, another
            size, or (unless ``allow_empty``) a mask of the batch that is 0 everywhere.
    """
    needed = "a mask batch [B, H, W] with values 0..1 (1 = edit)"
    mask = _tensor(name, mask, needed)
    arrived = f"{name}: got {describe(mask)}, but {needed} is needed."
    if mask.ndim == 2:
        raise InvalidImage(arrived, Remedy.ADD_MASK_BATCH)
    if mask.ndim == 4:
        if mask.shape[-1] in (1, 3, 4):
            raise InvalidImage(arrived, Remedy.IMAGE_TO_MASK)
        raise InvalidImage(f"{arrived} There is a channel dimension too many: remove it (mask[:, 0]).")
    if mask.ndim != 3:
        raise InvalidImage(arrived)
    if mask.dtype == torch.bool:
        mask = mask.float()
    if not mask.is_floating_point():
        raise InvalidImage(f"{arrived} Divide 8-bit values by 255 first (mask.float() / 255).")
    _not_empty(name, mask, needed)
    _finite(name, mask, "Look at the step that made the mask, or draw it again.")
    mask = _unit_range(name, mask, Remedy.SCALE_MASK)
    empty = (mask.amax(dim=(1, 2)) <= 0).tolist()
    if size is not None and tuple(mask.shape[1:]) != tuple(size):
        # Core's Load Image answers an image without transparency with 64x64 zeros: the size is not the real problem.
        placeholder = tuple(mask.shape[1:]) == (64, 64) and all(empty)
        raise InvalidImage(
            f"{name}: got {describe(mask)}, i.e. {mask.shape[2]}x{mask.shape[1]} pixels (width x height), "
            f"but {size[1]}x{size[0]} is needed.",
            Remedy.DRAW_MASK if placeholder else Remedy.RESIZE_MASK,
        )
    if not allow_empty and any(empty):
        which = "" if mask.shape[0] == 1 else f" Number {empty.index(True) + 1} of the {mask.shape[0]} masks is empty:"
        raise InvalidImage(
            f"{name}: got {describe(mask)} that is 0 everywhere, but a mask that selects something is needed.{which}",
            Remedy.INVERT_MASK,
        )
    return mask


def check_latent(name: str, samples: object, channels: int | None = None) -> Tensor:
    """Return the latent ``samples`` [B,C,H,W] (float, finite) when it is one, with ``channels`` channels if given.

    Raises:
        InvalidImage: not a tensor, not four dimensions, integer type, empty, NaN or infinity, another channel count.
    """
    wanted = "C" if channels is None else str(channels)
    needed = f"a latent batch [B, {wanted}, H, W] of finite floats"
    samples = _tensor(name, samples, needed)
    arrived = f"{name}: got {describe(samples)}, but {needed} is needed."
    if samples.ndim == 5:
        raise InvalidImage(f"{arrived} Five dimensions are a video latent: use a model and VAE for still images.")
    if samples.ndim != 4:
        raise InvalidImage(arrived, Remedy.ENCODE_IMAGE)
    if not samples.is_floating_point():
        raise InvalidImage(f"{arrived} Integers cannot be a latent.", Remedy.ENCODE_IMAGE)
    _not_empty(name, samples, needed)
    if channels is not None and samples.shape[1] != channels:
        raise InvalidImage(
            f"{arrived} A latent with {samples.shape[1]} channels belongs to another kind of model: encode the image "
            "with the VAE of the model that is connected here."
        )
    _finite(
        name,
        samples,
        "The latent is broken: encode the image again (a VAE in half precision is the usual cause), or lower the "
        "guidance of the step that made it.",
    )
    return samples


def check_steps(name: str, steps: object, minimum: int = 1, maximum: int | None = None) -> int:
    """Return ``steps`` when it is a whole number in ``minimum..maximum``.

    Raises:
        InvalidSchedule: not a whole number, or out of that range.
    """
    return _whole(name, steps, minimum, maximum, InvalidSchedule)


def check_whole(name: str, number: object, minimum: int = 1, maximum: int | None = None) -> int:
    """Return ``number``, a setting other than steps, when it is a whole number in ``minimum..maximum``.

    Raises:
        InvalidSetting: not a whole number, or out of that range.
    """
    return _whole(name, number, minimum, maximum, InvalidSetting)


def _whole(name: str, number: object, minimum: int, maximum: int | None, error: type[InvalidSetting]) -> int:
    needed = f"a whole number of at least {minimum}" if maximum is None else f"a whole number {minimum} to {maximum}"
    if isinstance(number, bool) or not isinstance(number, int):
        raise error(f"{name}: got {number!r} ({type(number).__name__}), but {needed} is needed. Round it.")
    if number < minimum:
        raise error(f"{name}: got {number}, but {needed} is needed. Raise it to {minimum} or more.")
    if maximum is not None and number > maximum:
        raise error(f"{name}: got {number}, but {needed} is needed. Lower it to {maximum} or less.")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise InvalidSetting unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InvalidSetting(f"{name}: got {value!r}, but one of {', '.join(choices)} is needed.")


def match_batch(mask: Tensor, batch: int, name: str) -> Tensor:
    """Give ``mask`` [1 or B, ...] the batch size ``batch``: one mask serves every image, else one for each.

    It works on any tensor whose first dimension is the batch. The result is a view where it repeats.

    Raises:
        InvalidImage: neither one nor ``batch`` entries.
    """
    if mask.shape[0] == batch:
        return mask
    if mask.shape[0] != 1:
        raise InvalidImage(
            f"{name}: got {mask.shape[0]} in {describe(mask)} for a batch of {batch} images, but one for all or one "
            f"for each is needed. Give one, or exactly {batch}."
        )
    return mask.expand(batch, *mask.shape[1:])


def check_same_size(name: str, image: Tensor, other_name: str, other: Tensor) -> None:
    """Two image batches [B,H,W,3] must have one height and width.

    Raises:
        InvalidImage: they differ.
    """
    if image.shape[1:3] != other.shape[1:3]:
        raise InvalidImage(
            f"{name}: got {describe(image)}, i.e. {image.shape[2]}x{image.shape[1]} pixels (width x height), but the "
            f"{other.shape[2]}x{other.shape[1]} of {other_name} is needed.",
            Remedy.CROP_SOURCE,
        )
