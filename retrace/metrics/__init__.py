"""How much an edit changed and kept: pixel metrics, LPIPS, CLIP scores, structure distance, and their report."""

from __future__ import annotations

from .clip_score import ClipScores, clip_score, clip_scores
from .perceptual import find_backbone, load_lpips, lpips_distance
from .quality import PSNR_CAP, changed_pixels, eight_bit_difference, mse, psnr, ssim, ssim_map
from .report import EditReport, ImageScores, RegionScores, edit_report
from .structure import self_similarity, spatial_tokens, structure_distance

__all__ = [
    "PSNR_CAP",
    "ClipScores",
    "EditReport",
    "ImageScores",
    "RegionScores",
    "changed_pixels",
    "clip_score",
    "clip_scores",
    "edit_report",
    "eight_bit_difference",
    "find_backbone",
    "load_lpips",
    "lpips_distance",
    "mse",
    "psnr",
    "self_similarity",
    "spatial_tokens",
    "ssim",
    "ssim_map",
    "structure_distance",
]
