"""From the latent of an image to the noise that sampling turns back into it, and files that keep it."""
