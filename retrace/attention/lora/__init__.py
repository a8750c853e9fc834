"""A LoRA that has seen one image: with it the model keeps what the image shows while it is edited.

DragDiffusion (Shi et al. 2024, arXiv 2306.14435, section 3.2) fine-tunes Stable Diffusion on the image to be edited, by
low-rank changes of all attention projections (Hu et al. 2022, arXiv 2106.09685) and the loss of ordinary training.
"""
