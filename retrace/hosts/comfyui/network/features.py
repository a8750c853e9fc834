"""Outputs of the UNet's blocks, collected while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..plain import alias
from ..types import Network
from .unet import feature_layer


class FeatureRecorder:
    """Keeps the outputs of blocks from the newest call of the denoiser, ``[rows, C, h, w]``.

    Core may split one call into several passes and orders conditions as it likes; the rows kept are in the order of the
    conditions given to the denoiser, all images of the first, then all of the second.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self._blocks = blocks
        self._passes: list[tuple[list[int], dict[str, Tensor]]] = []

    def begin(self) -> None:
        """The denoiser is about to be called."""
        self._passes = []

    def observe(self, conds: list[int]) -> None:
        """A pass of the network begins; its rows are of these conditions, in this order."""
        self._passes.append((conds, {}))

    def finish(self) -> None:
        """The call is over: put its passes together."""
        for name in self._blocks:
            chunks: dict[int, Tensor] = {}
            for conds, outputs in self._passes:
                if name in outputs:
                    whole = outputs[name]
                    if len(self._passes) == 1 and conds == sorted(set(conds)):
                        self.kept[name] = alias(whole)
                        break
                    chunks.update(zip(conds, whole.chunk(len(conds)), strict=True))
            else:
                if chunks:
                    self.kept[name] = alias(torch.cat([chunks[cond] for cond in sorted(chunks)]))
        self._passes = []

    @contextmanager
    def hooked(self, network: Network) -> Iterator[None]:
        """Inside, the blocks of ``network`` report their outputs."""

        def keep(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Tensor) -> None:
                if self._passes:
                    self._passes[-1][1][name] = output

            return hook

        layers = {name: feature_layer(network, name) for name in self._blocks}
        handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
