"""The border where errors of the library become messages of a node."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import torch

from ..retrace.core.errors import RetraceError

F = TypeVar("F", bound=Callable[..., Any])

# A subclass of what ComfyUI itself looks for: its executor then unloads all models, as it does for any other node.
_CORE_OOM = comfy.model_management.OOM_EXCEPTION
_CORE_KNOWS = issubclass(_CORE_OOM, RuntimeError)  # else it is plain Exception, which says nothing
_OOM_BASES = (RetraceError, _CORE_OOM) if _CORE_KNOWS else (RetraceError,)
OutOfMemory = type("OutOfMemory", _OOM_BASES, {"__doc__": "The device or the computer has no memory left."})


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    known = getattr(comfy.model_management, "is_oom", None)  # newer cores also know the errors of other accelerators
    if known is not None and _CORE_KNOWS and known(error):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def reports_errors(node: str) -> Callable[[F], F]:
    """Decorate ``execute`` of the node displayed as ``node``: its errors begin with that name.

    Running out of memory becomes a message that says what to do. All other exceptions pass unchanged.
    """

    def decorate(execute: F) -> F:
        @functools.wraps(execute)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            message: str | None = None
            try:
                return execute(*args, **kwargs)
            except RetraceError as error:
                text = str(error)
                raise type(error)(text if text.startswith(node) else f"{node}: {text}") from error
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                message = (
                    f"{node}: out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
                    "Use a smaller image or a smaller batch, close other programs that use the graphics card, or "
                    "start ComfyUI with --lowvram (on the CPU: --cpu with fewer images at once)."
                )
            # Raised out here, where the failed call no longer holds its tensors.
            raise OutOfMemory(message)

        return guarded  # type: ignore[return-value]

    return decorate
