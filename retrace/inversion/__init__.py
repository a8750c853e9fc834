"""From the latent of an image to the noise that sampling turns back into it, and files that keep it.

``invert`` walks a schedule with one of three ways to solve a step; ``steps`` holds ``Problem`` and the ways, for a loop
of your own. ``edit_friendly`` keeps the noise of every step, ``null_text`` optimises embeddings, ``files`` are files.
"""
