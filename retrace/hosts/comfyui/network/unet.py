"""Where things are inside ComfyUI's UNet, in the names that diffusers gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ....core.errors import RetraceError, UnsupportedModel
from ..types import Network


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of one transformer block: how core addresses it, and how the Host protocol names it."""

    patch: Literal["attn1", "attn2"]
    key: tuple[str, int, int]  # core's: part of the UNet, number there, depth inside the transformer
    kind: Literal["self", "cross"]
    block: str
    index: int
    heads: int


def attention_layers(network: Network) -> list[AttentionLayer]:
    """All attention layers in the order they run; raises :class:`UnsupportedModel` without a UNet."""
    names = _block_names(network)
    layers: list[AttentionLayer] = []
    index = 0
    for part, blocks in _parts(network):
        for number, sequence in enumerate(blocks):
            transformers = [layer for layer in sequence if hasattr(layer, "transformer_blocks")]
            for depth, block in enumerate(block for layer in transformers for block in layer.transformer_blocks):
                key, name = (part, number, depth), names[part][number]
                first: Literal["self", "cross"] = "cross" if block.disable_self_attn else "self"
                layers.append(AttentionLayer("attn1", key, first, name, index, block.n_heads))
                if block.attn2 is not None:
                    layers.append(AttentionLayer("attn2", key, "cross", name, index, block.n_heads))
                index += 1
    return layers


def feature_layer(network: Network, name: str) -> nn.Module:
    """The module whose output is that of block ``name`` ("up.0", "mid.0", "down.1").

    Raises :class:`RetraceError` when the network has no such block.
    """
    last: dict[str, nn.Module] = {}
    names = _block_names(network)
    for part, blocks in _parts(network):
        for number, sequence in enumerate(blocks):
            # Core walks through the layers of a block itself, so a hook on the block as a whole would never run.
            last[names[part][number]] = sequence[-1]
    if name not in last:
        raise RetraceError(f"This model has no block '{name}'. It has: {', '.join(last)}.")
    return last[name]


def feature_blocks(network: Network) -> tuple[str, ...]:
    """Blocks from the middle of the network on, in the order they run; none for a network that is no UNet."""
    try:
        names = _block_names(network)
    except UnsupportedModel:
        return ()
    return ("mid.0", *dict.fromkeys(names["output"]))


def _parts(network: Network) -> list[tuple[str, Any]]:
    return [("input", network.input_blocks), ("middle", [network.middle_block]), ("output", network.output_blocks)]


def _block_names(network: Network) -> dict[str, list[str]]:
    """Names by part and number. Core counts layers one by one, diffusers in blocks of one resolution.

    Going down, a block has its residual layers and then the downsampler, which only the last block lacks; coming up, it
    has one residual layer more, and the upsampler is part of the last.
    """
    residuals = getattr(network, "num_res_blocks", None)
    parts = ("input_blocks", "middle_block", "output_blocks")
    if not residuals or any(getattr(network, part, None) is None for part in parts):
        raise UnsupportedModel(
            f"This needs a UNet of the SD1.5 or SDXL kind; the connected model is a '{type(network).__name__}', whose "
            "attention layers and features lie elsewhere. Connect an SD1.5 or SDXL model."
        )
    down = ["down.0"] + [f"down.{level}" for level, count in enumerate(residuals) for _ in range(count + 1)]
    up = [f"up.{level}" for level, count in enumerate(reversed(residuals)) for _ in range(count + 1)]
    down = down[:-1]
    if len(down) != len(network.input_blocks) or len(up) != len(network.output_blocks):
        raise UnsupportedModel(
            f"This UNet has {len(network.input_blocks)} input and {len(network.output_blocks)} output layers where its "
            f"configuration describes {len(down)} and {len(up)}. Connect an SD1.5 or SDXL model."
        )
    return {"input": down, "middle": ["mid.0"], "output": up}
