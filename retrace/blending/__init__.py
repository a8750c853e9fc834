"""Blended diffusion: edit inside a mask and keep what is outside (Avrahami et al. 2022, 2023)."""
