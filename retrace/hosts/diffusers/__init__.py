"""The Host protocol over a diffusers UNet model, for use without ComfyUI."""

from __future__ import annotations

from .host import DiffusersHost

__all__ = ["DiffusersHost"]
