"""Null-text inversion: unconditional embeddings that bring an image back under guidance (Mokady et al. 2023).

``optimise`` runs the whole loop with ``settings``; ``steps`` holds ``Optimisation``, the problem of all steps, and the
two ways to take one, for a loop of your own.
"""
