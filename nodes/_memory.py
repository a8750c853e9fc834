"""How much memory a piece of work needed at most."""

from __future__ import annotations

import sys

import comfy.model_management
import torch


class PeakMemory:
    """Starts to measure when made; on a graphics card its own peak, on the processor that of the whole program."""

    def __init__(self) -> None:
        self.device = comfy.model_management.get_torch_device()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def megabytes(self) -> int | None:
        """Peak in MB so far; None where the platform cannot tell."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device) / 1e6)
        try:
            import resource  # not on Windows
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak / 1e6 if sys.platform == "darwin" else peak / 1e3)
