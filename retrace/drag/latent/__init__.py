"""Dragging in the latent: DragDiffusion (Shi et al. 2024) and GoodDrag (Zhang et al. 2024)."""
