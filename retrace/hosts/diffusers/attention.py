"""Hooks on the UNet of diffusers: attention layers and the outputs of decoder blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RetraceError
from ...core.host import AttentionCall, AttentionHook, Row
from .types import AttentionModule, UNet

_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])\."
)


@dataclass
class Batch:
    """What the network is being called with: the owners of the batch rows, and the noise level."""

    rows: tuple[Row, ...] = ()
    sigma: float = 0.0


class _Processor:
    """The attention of diffusers for UNets (group norm and masks never occur there), with the hook in its middle."""

    def __init__(
        self,
        hook: AttentionHook,
        kind: Literal["self", "cross"],
        block: str,
        index: int,
        size: dict[str, tuple[int, int]],
        batch: Batch,
    ):
        self.hook, self.kind, self.block, self.index = hook, kind, block, index
        self.size, self.batch = size, batch

    def __call__(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: object,
        **__: object,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, source in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        height, width = self.size["query"]
        call = AttentionCall(
            self.kind,
            self.block,
            self.index,
            height,
            width,
            self.batch.rows,
            self.batch.sigma,
            partial(F.scaled_dot_product_attention, scale=attn.scale),
        )
        out = self.hook(call, q, k, v)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor
        return projected


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of one transformer block: where it is, and how the Host protocol names it."""

    path: str  # of the module
    block: str
    index: int  # running number of the transformer block
    number: Literal[1, 2]  # 1 is self-attention, 2 cross-attention


def attention_layers(unet: UNet) -> list[AttentionLayer]:
    """All attention layers of ``unet`` in the order they run."""
    layers = []
    for name in unet.attn_processors:
        found = _BLOCK.match(name)
        if found:
            side, number, mid, attention, transformer, layer = found.groups()
            order = (("down", "mid", "up").index(side or mid), int(number or 0), int(attention), int(transformer))
            layers.append((order, int(layer), name.removesuffix(".processor"), f"{side or mid}.{number or 0}"))
    running = {order: i for i, order in enumerate(sorted({order for order, *_ in layers}))}
    return [AttentionLayer(path, block, running[order], 1 if n == 1 else 2) for order, n, path, block in sorted(layers)]


def attention_blocks(unet: UNet) -> list[str]:
    """The block of every transformer block in the order they run: "down.0", "mid.0", "up.2"."""
    return [layer.block for layer in attention_layers(unet) if layer.number == 1]


@contextmanager
def attention_hook(unet: UNet, hook: AttentionHook, batch: Batch) -> Iterator[None]:
    """Inside, the self- and cross-attention of every transformer block of ``unet`` goes through ``hook``."""
    before = dict(unet.attn_processors)
    size: dict[str, tuple[int, int]] = {}
    replaced = {
        f"{layer.path}.processor": _Processor(
            hook, "self" if layer.number == 1 else "cross", layer.block, layer.index, size, batch
        )
        for layer in attention_layers(unet)
    }

    def note_size(_: object, inputs: tuple[Tensor, ...]) -> None:
        size["query"] = (inputs[0].shape[-2], inputs[0].shape[-1])

    spatial = [m for n, m in unet.named_modules() if re.search(r"\.attentions\.\d+$", n)]
    handles = [m.register_forward_pre_hook(note_size) for m in spatial]
    try:
        unet.set_attn_processor({**before, **replaced})
        yield
    finally:
        for handle in handles:
            handle.remove()
        unet.set_attn_processor(before)


def feature_blocks(unet: UNet) -> dict[str, nn.Module]:
    """The blocks from the middle of the network on by name, in the order they run."""
    return {"mid.0": unet.mid_block} | {f"up.{i}": block for i, block in enumerate(unet.up_blocks)}


def feature_layer(unet: UNet, name: str) -> nn.Module:
    """The block of that name.

    Raises:
        RetraceError: a block that this model does not have.
    """
    known = feature_blocks(unet)
    if name not in known:
        raise RetraceError(f"Features of {name} were asked for; this model has {', '.join(known)}.")
    return known[name]


@contextmanager
def feature_hook(unet: UNet, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs of ``blocks`` (``"mid.0"``, ``"up.0"`` ...) are kept in the dict that is given.

    Raises:
        RetraceError: a block that this model does not have.
    """
    layers = {name: feature_layer(unet, name) for name in blocks}
    kept: dict[str, Tensor] = {}

    def keep(name: str, _: object, __: object, output: Tensor) -> None:
        kept.pop(name, None)  # so that the newest comes last
        kept[name] = output

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
