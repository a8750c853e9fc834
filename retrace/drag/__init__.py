"""Point dragging: move what lies at a handle point to a target point, and keep the rest (Shi et al. 2024)."""
