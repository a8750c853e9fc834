"""Blocks of a UNet that keep their inputs only and compute the rest again when gradients come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Residual and transformer blocks of ComfyUI's and diffusers' UNets; almost all of a graph's memory is inside them.
BLOCKS = frozenset({"ResBlock", "ResnetBlock2D", "BasicTransformerBlock"})


@contextmanager
def recomputed(network: nn.Module | None) -> Iterator[None]:
    """Inside, the blocks of ``network`` are checkpointed (Chen et al. 2016, arXiv 1604.06174). ``None`` does nothing.

    The backward pass has to happen inside as well: hooks on layers within a block run again with it.
    """
    blocks = [block for block in network.modules() if type(block).__name__ in BLOCKS] if network is not None else []
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(_forward, block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is not None:
                block.forward = own
            else:
                vars(block).pop("forward", None)


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # ComfyUI hands one dictionary through the whole network and notes in it which block is running.
    args = tuple(dict(value) if type(value) is dict else value for value in args)
    kwargs = {name: dict(value) if type(value) is dict else value for name, value in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
