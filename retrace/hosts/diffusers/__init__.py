"""The Host protocol over a diffusers UNet model, for use without ComfyUI.

:meth:`DiffusersHost.run` takes what ``encode_text`` gives, or a :class:`TextCondition` of embeddings of your own.
"""

from __future__ import annotations

from .host import DiffusersHost
from .text import TextCondition

__all__ = ["DiffusersHost", "TextCondition"]
