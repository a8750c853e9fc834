"""ComfyUI's networks: their attention layers, feature blocks and low-rank adapters."""
