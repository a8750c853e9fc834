"""Models of this pack as ComfyUI's MODEL, CLIP and VAE."""
