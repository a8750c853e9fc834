"""What every test may rely on."""

from __future__ import annotations

import importlib.util
import sys

import torch

_declared: list[torch.library.Library] = []  # the declarations last as long as these objects


def _let_torchvision_import() -> None:
    """Declare the operators that torchvision's Python code names where its compiled library does not load.

    A torchvision beside another build of torch than its own (a CUDA wheel beside a CPU torch) stops at ``import
    torchvision``. open_clip, lpips and transformers import it for parts that need no operator.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


_let_torchvision_import()
# Tests compare numbers, not speed, and several runs may share a machine.
torch.set_num_threads(min(2, torch.get_num_threads()))
