"""Point dragging: move what lies at a handle point to a target point, and keep the rest (Shi et al. 2024).

- ``points``: pairs of handle and target, and the brush strokes painted beside them, as text and as tensors
- ``drawing``: the ways of the points on the picture

Dragging in the latent:

- ``edit``: a drag as a whole, between the latent of a picture and what a sampler goes on with
- ``optimise``: DragDiffusion's loop, which changes one noisy latent until the points have arrived
- ``gooddrag``: GoodDrag's, which drags and denoises in turns
- ``task``: what both work on; ``motion``: motion supervision and point tracking, on feature maps
- ``reference_kv``: self-attention that reads keys and values of a reference picture

Dragging the pixels:

- ``warp``: the same points as a geometric warp, with a mask of what it uncovers
- ``deformation``: the smooth map through the points; ``field``: that map on the pixels of a picture
- ``regions``: parts of a mask and what lies near them; ``fill``: a smooth ground for the hole
"""
