"""Null-text inversion: unconditional embeddings that bring an image back under guidance (Mokady et al. 2023)."""
