"""Let torchvision import where its compiled operators do not load.

A torchvision wheel is compiled for one build of torch. Beside another build (a CUDA wheel beside a CPU torch is the
usual case) its library does not load, and ``import torchvision`` stops at ``operator torchvision::nms does not exist``,
although everything written in Python would work. transformers, open_clip and lpips import it for just that part.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # the declarations last as long as this object


def ensure_importable() -> None:
    """Declare the two operators that torchvision's Python code names, if they are missing; they get no kernel."""
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
            library.define(operator + _SCHEMA)
        _libraries.append(library)
