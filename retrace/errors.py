"""Errors a user can act on: every message says what arrived, what is needed and what to do."""

from __future__ import annotations

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
