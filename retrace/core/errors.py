"""Errors a user can act on: every message says what arrived, what is needed and what to do."""

from __future__ import annotations

import errno
import importlib
from types import ModuleType


class RetraceError(ValueError):
    """Base of all errors that this library raises on purpose."""


class InvalidImage(RetraceError):
    """An image, mask or latent of the wrong shape, range or type."""


class InvalidSchedule(RetraceError):
    """Step counts or sigmas that no sampler could follow."""


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
