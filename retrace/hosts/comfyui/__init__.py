"""The Host protocol over ComfyUI's MODEL, CLIP and VAE. Only this folder touches ComfyUI internals."""

from __future__ import annotations

from .host import ComfyHost
from .models.pebble import load_pebble

__all__ = ["ComfyHost", "load_pebble"]
