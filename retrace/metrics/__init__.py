"""How much an edit changed and kept: MSE, PSNR, SSIM and LPIPS inside and outside the mask, and their report."""

from __future__ import annotations

from .perceptual import find_backbone, load_lpips, lpips_distance
from .quality import PSNR_CAP, changed_pixels, eight_bit_difference, mse, psnr, ssim, ssim_map
from .report import EditReport, ImageScores, RegionScores, edit_report

__all__ = [
    "PSNR_CAP",
    "EditReport",
    "ImageScores",
    "RegionScores",
    "changed_pixels",
    "edit_report",
    "eight_bit_difference",
    "find_backbone",
    "load_lpips",
    "lpips_distance",
    "mse",
    "psnr",
    "ssim",
    "ssim_map",
]
