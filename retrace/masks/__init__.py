"""Masks [B,H,W], 1 = edit: SmartBrush's precision levels, the latent grid, shrinking over the steps, soft edges."""

from __future__ import annotations

from .feather import feather, feather_inward
from .latent import LatentMaskMode, latent_mask, shrink_schedule
from .precision import mask_precision, precision_kernel

__all__ = [
    "LatentMaskMode",
    "feather",
    "feather_inward",
    "latent_mask",
    "mask_precision",
    "precision_kernel",
    "shrink_schedule",
]
