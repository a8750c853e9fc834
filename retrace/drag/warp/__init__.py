"""Dragging the pixels: a geometric warp through the points, and the mask of what it uncovers."""
