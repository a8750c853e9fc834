"""Errors a user can act on: every message says what arrived, what is needed and what to do."""

from __future__ import annotations

import errno
import importlib
from enum import Enum
from types import ModuleType


class Remedy(Enum):
    """What puts an error right, in the words of Python; a host may have better ones, such as the node to connect."""

    ADD_MASK_BATCH = "The batch dimension is missing: add it (mask[None])."
    CONNECT_CLIP = "Pass an image-text model, or empty the prompt."
    CONNECT_PROMPT = "Pass one encoded prompt."
    CROP_SOURCE = "Resize one of them. A VAE cuts sizes that are not multiples of 8, so crop the source first."
    DRAW_MASK = "It is empty and of another size: draw a mask on the image."
    DROP_ALPHA = "There is a fourth channel (RGBA): pass the first three."
    ENCODE_IMAGE = "Encode the image with the VAE of this model."
    FLIP_SIGMAS = "They ascend: turn them round (sigmas.flip(0))."
    IMAGE_TO_MASK = "This looks like an image: take one of its channels."
    INVERT_AGAIN = "Pass the trajectory of an inversion."
    INVERT_MASK = "Mark the area to edit with 1, or invert the mask if it is the wrong way round."
    JOIN_REFERENCE = "Put the reference and the edit into one batch, the reference first."
    MASK_TO_IMAGE = "There are three dimensions instead of four: add the missing one (image[None])."
    PLACE_POINTS = "Place at least one handle and its target."
    RAISE_MASK = "Raise the values of the mask."
    REPEAT_GREY = "There is one channel (grey): repeat it three times (image.expand(-1, -1, -1, 3))."
    RESIZE_MASK = "Resize the mask to the image, or make it from the image that is edited."
    SAVED_INVERSION = "Choose a file that an inversion was saved to."
    SCALE_IMAGE = "Divide 0..255 values by 255; bring -1..1 values over with (x + 1) / 2."
    SCALE_MASK = "Divide 0..255 values by 255."
    TAKE_ONE_IMAGE = "Take one image out of the batch (image[:1])."
    TAKE_ONE_LATENT = "Take one latent out of the batch (latent[:1])."
    WARP_INSTEAD = "Use one of these, or warp the image by its points, which needs no model."


class RetraceError(ValueError):
    """Base of all errors that this library raises on purpose.

    ``what`` says what arrived and what is needed. ``remedy``, where there is one, follows it in the text of the error;
    a host puts its own words in its place (see ``nodes/_errors.py``).
    """

    def __init__(self, what: str, remedy: Remedy | None = None) -> None:
        super().__init__(what if remedy is None else f"{what} {remedy.value}")
        self.what = what
        self.remedy = remedy


class InvalidImage(RetraceError):
    """An image, mask or latent of the wrong shape, range or type."""


class InvalidSetting(RetraceError):
    """A number or a choice that the method cannot work with."""


class InvalidSchedule(InvalidSetting):
    """Step counts or sigmas that no sampler could follow."""


class InvalidInput(RetraceError):
    """Something else than what is needed: a foreign object, none at all, or one too many."""


class InvalidPoints(RetraceError):
    """Drag points, or brush strokes, that cannot be read or cannot be dragged."""


class UnsupportedModel(RetraceError):
    """The method cannot work with this model, and says why."""


class TrajectoryMismatch(RetraceError):
    """An inversion that belongs to another model, size, prompt or schedule."""


class InvalidFile(RetraceError):
    """A file that is missing, truncated, foreign or of another version."""


class MissingPackage(RetraceError, ImportError):
    """An optional package is not installed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the computer had no memory left; PyTorch says so in a different way on each of them."""
    if isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    if isinstance(error, OSError):  # reading a model: no address space, or on Windows "the paging file is too small"
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) == 1455
    texts = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "erroroutofmemory")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def require(package: str, purpose: str, pip_name: str | None = None) -> ModuleType:
    """Import an optional ``package``; raises :class:`MissingPackage` with the pip line when it is not there.

    ``purpose`` completes the sentence "... is needed to <purpose>".
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != package.split(".")[0]:
            raise  # the package is there, something inside it is not: that message is the useful one
        raise MissingPackage(
            f"The package '{package}' is needed to {purpose} and is not installed. "
            f"Install it in the Python that runs this program: pip install {pip_name or package}"
        ) from error
