"""What is not part of the product: the driver of a ComfyUI, the scene parser, upkeep of texts."""
