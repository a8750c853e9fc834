"""What every test may rely on."""

from __future__ import annotations

import torch

from retrace.torchvision_ops import ensure_importable

# open_clip and lpips import torchvision; see there for the machines on which that alone would fail.
ensure_importable()
# Tests compare numbers, not speed, and several runs may share a machine.
torch.set_num_threads(min(2, torch.get_num_threads()))
