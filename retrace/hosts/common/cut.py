"""A network that is run no further than needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class NetworkCut(BaseException):
    """Ends a run of the network after the layer that was asked for; not an error, and no handler of errors sees it."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


@contextmanager
def cut_after(layer: nn.Module) -> Iterator[None]:
    """Inside, a run of the network that has ``layer`` ends with :class:`NetworkCut`, which holds its output."""

    def stop(module: Any, inputs: Any, output: Tensor) -> None:
        raise NetworkCut(output)

    handle = layer.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()
