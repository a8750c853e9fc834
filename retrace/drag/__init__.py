"""Point dragging: move what lies at a handle point to a target point, and keep the rest (Shi et al. 2024).

- ``points``: pairs of handle and target, and the brush strokes painted beside them, as text and as tensors
- ``motion``: motion supervision and point tracking, on feature maps
- ``optimise``: the loop that changes a noisy latent until the points have arrived
- ``reference_kv``: self-attention that reads keys and values of a reference picture
- ``warp``: the same points as a geometric warp, with a mask of what it uncovers
"""
