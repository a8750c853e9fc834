"""What changes a network while it runs: keys and values of a reference image, low-rank adapters."""
