"""The border where errors of the library become messages of a node."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management

from ..retrace.core.errors import Remedy, RetraceError, is_out_of_memory

F = TypeVar("F", bound=Callable[..., Any])

# A subclass of what ComfyUI itself looks for: its executor then unloads all models, as it does for any other node.
_CORE_OOM = comfy.model_management.OOM_EXCEPTION
_CORE_KNOWS = issubclass(_CORE_OOM, RuntimeError)  # else it is plain Exception, which says nothing
_OOM_BASES = (RetraceError, _CORE_OOM) if _CORE_KNOWS else (RetraceError,)
OutOfMemory = type("OutOfMemory", _OOM_BASES, {"__doc__": "The device or the computer has no memory left."})

WIRES = {
    Remedy.ADD_MASK_BATCH: "Make the mask with 'Load Image' or 'Convert Image to Mask'.",
    Remedy.CONNECT_CLIP: "Connect 'Load CLIP (Retrace)', or empty the prompt.",
    Remedy.CONNECT_PROMPT: "Connect one 'CLIP Text Encode'.",
    Remedy.CROP_SOURCE: "Resize one of them to the other ('Upscale Image'). A VAE cuts sizes that are not multiples of "
    "8, so crop or resize the source first.",
    Remedy.DRAW_MASK: "An empty 64x64 mask is what 'Load Image' gives for an image without transparency: draw a mask "
    "on the image (right click, 'Open in MaskEditor') or load one with 'Load Image (as Mask)'.",
    Remedy.DROP_ALPHA: "There is a fourth channel (RGBA): send the image through 'Split Image with Alpha' and connect "
    "its image output here (its mask output holds the transparency).",
    Remedy.ENCODE_IMAGE: "Connect a LATENT: encode the image with 'VAE Encode' and the VAE of this model.",
    Remedy.FLIP_SIGMAS: "They ascend: use 'Flip Sigmas'.",
    Remedy.IMAGE_TO_MASK: "This looks like an image: send it through 'Convert Image to Mask'.",
    Remedy.INVERT_AGAIN: "Connect 'DDIM Inverter'.",
    Remedy.INVERT_MASK: "Paint the area to edit in white (1 = edit), or use 'Invert Mask' if it is the wrong way "
    "round.",
    Remedy.JOIN_REFERENCE: "Connect the LATENT of 'Drag Latent Optimizer', or join the latents of the two images with "
    "'Latent Batch', the reference first.",
    Remedy.MASK_TO_IMAGE: "There are three dimensions instead of four: if this is a mask, send it through 'Convert "
    "Mask to Image'.",
    Remedy.PLACE_POINTS: "Place at least one handle and its target in 'Drag Points'.",
    Remedy.RAISE_MASK: "Raise the values of the mask ('Threshold Mask').",
    Remedy.REPEAT_GREY: "There is one channel (grey): if this is a mask, send it through 'Convert Mask to Image' or "
    "connect it to a mask input.",
    Remedy.RESIZE_MASK: "Resize the mask to the image ('Resize Image/Mask'), or make it from the image that is edited.",
    Remedy.SAVED_INVERSION: "Choose a file that 'Save Inversion' wrote.",
    Remedy.SCALE_MASK: "Send the mask through 'Threshold Mask'.",
    Remedy.TAKE_ONE_IMAGE: "Take one with 'Image From Batch'.",
    Remedy.TAKE_ONE_LATENT: "Take one with 'Latent From Batch'.",
    Remedy.WARP_INSTEAD: "Connect one of these, or use 'Warp and Inpaint', which works with every model.",
}
"""What to connect, where ComfyUI has a node for it; other remedies keep the words of the library."""


def text_of(error: RetraceError) -> str:
    """The message of an error in ComfyUI's words."""
    wire = WIRES.get(error.remedy) if error.remedy is not None else None
    return str(error) if wire is None else f"{error.what} {wire}"


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
                text = text_of(error)
                raise type(error)(text if text.startswith(node) else f"{node}: {text}") from error
            except Exception as error:
                known = getattr(comfy.model_management, "is_oom", None)  # newer cores know more accelerators
                if not is_out_of_memory(error) and not (known is not None and _CORE_KNOWS and known(error)):
                    raise
                message = (
                    f"{node}: out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
                    "Use a smaller image or a smaller batch, close other programs that use the graphics card, or start "
                    "ComfyUI with --lowvram (on the CPU: --cpu with fewer images at once)."
                )
            # Raised out here, where the failed call no longer holds its tensors.
            raise OutOfMemory(message)

        return guarded  # type: ignore[return-value]

    return decorate
