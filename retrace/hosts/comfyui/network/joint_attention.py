"""Transformers in which text and picture share one attention (Flux, Chroma, SD3, Qwen-Image): its keys and values.

Core lets a node replace a whole block of such a network, and every attention function by another
(``optimized_attention_override``), but the override does not know which block it runs in. So each block is wrapped, and
its wrapper hands an override of its own to the block. That works alike in all supported versions of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ....core.errors import UnsupportedModel
from ....core.host import Row
from ..types import Network, Options
from .attention import NoiseLevel

Key = tuple[str, int]  # core's name of a block: ("double_block", 3)


class RowExchange(Protocol):
    """Decides which rows of a batch read keys and values of other rows."""

    def __call__(self, layer: int, sigma: float, rows: tuple[Row, ...]) -> Sequence[int] | None:
        """For every row the row whose picture it reads; None leaves the block of running number ``layer`` alone."""
        ...


def joint_blocks(network: Network) -> list[Key]:
    """The blocks in the order they run; none for a network that is not known to have the text first in its tokens."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model
    import comfy.ldm.modules.diffusionmodules.mmdit
    import comfy.ldm.qwen_image.model

    if isinstance(network, (comfy.ldm.flux.model.Flux, comfy.ldm.chroma.model.Chroma)):
        double, single = len(network.double_blocks), len(network.single_blocks)
    elif isinstance(network, comfy.ldm.modules.diffusionmodules.mmdit.MMDiT):
        double, single = len(network.joint_blocks), 0
    elif isinstance(network, comfy.ldm.qwen_image.model.QwenImageTransformer2DModel):
        double, single = len(network.transformer_blocks), 0
    else:
        return []
    return [("double_block", i) for i in range(double)] + [("single_block", i) for i in range(single)]


def install_exchange(options: Options, network: Network, exchange: RowExchange) -> None:
    """Let picture tokens be read from other rows, as ``exchange`` says, when ``network`` runs with these options.

    What the tokens of the text hold stays each row's own, as do all queries. A replacement of another pack that is
    there already runs inside.
    """
    transformer = options["transformer_options"] = {**options.get("transformer_options", {})}
    replace = transformer["patches_replace"] = {**transformer.get("patches_replace", {})}
    blocks = replace["dit"] = {**replace.get("dit", {})}
    moment = _Moment()
    for layer, key in enumerate(joint_blocks(network)):
        blocks[key] = _Block(key, layer, exchange, blocks.get(key), moment)


class _Moment(NoiseLevel):
    """What the blocks of the running pass share."""

    text = 0  # tokens of text; older versions tell only the blocks that get the text by itself


class _Block:
    """What core calls in place of one block."""

    def __init__(self, key: Key, layer: int, exchange: RowExchange, earlier: Any, moment: _Moment) -> None:
        self.key, self.layer, self.exchange, self.earlier, self.moment = key, layer, exchange, earlier, moment

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        """Older cores copy model options deeply when a MODEL is cloned."""
        return self

    def __call__(self, args: Options, extra: Options) -> Any:
        options = args["transformer_options"]
        if "txt" in args:
            text, picture = args["txt"].shape[1], args["img"].shape[1]
            self.moment.text = text
        else:  # text and picture come as one
            text = options["img_slice"][0] if "img_slice" in options else self.moment.text
            picture = args["img"].shape[1] - text
        conds, count = options["cond_or_uncond"], args["img"].shape[0]
        rows = tuple(Row(cond, image) for cond in conds for image in range(count // len(conds)))
        sources = self.exchange(self.layer, self.moment.sigma(options["sigmas"]), rows)
        if sources is None:
            return self._run(args, extra)
        override = _Override(options.get("optimized_attention_override"), sources, text, picture)
        options = {**options, "optimized_attention_override": override}
        out = self._run({**args, "transformer_options": options}, extra)
        if not override.used:
            name, number = self.key
            raise UnsupportedModel(
                f"Block {number} of kind '{name}' ran without telling its attention, because another node replaces it. "
                "Remove the nodes that change this model's blocks (caches, other attention controls) and try again."
            )
        return out

    def _run(self, args: Options, extra: Options) -> Any:
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)


class _Override:
    """An attention function whose picture tokens hold the keys and values of the rows ``sources``."""

    def __init__(self, earlier: Any, sources: Sequence[int], text: int, picture: int) -> None:
        self.earlier, self.sources, self.text, self.picture = earlier, list(sources), text, picture
        self.used = False

    def __call__(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.used = True
        # [rows, heads, tokens, dim] where the caller has split the heads already, else [rows, tokens, heads * dim].
        tokens = k.shape[2 if kwargs.get("skip_reshape") else 1]
        if tokens not in (self.text + self.picture, self.picture) or k.shape[0] != len(self.sources):
            raise UnsupportedModel(
                f"Attention runs on {k.shape[0]} x {tokens} tokens instead of {len(self.sources)} x "
                f"{self.text + self.picture}: another node merges, cuts or adds some. Remove that node."
            )
        # SD3.5 medium also has an attention of the picture alone.
        text = tokens - self.picture
        k, v = self._read(k, text, kwargs), self._read(v, text, kwargs)
        if self.earlier is not None:
            return self.earlier(function, q, k, v, *args, **kwargs)  # type: ignore[no-any-return]
        return function(q, k, v, *args, **kwargs)

    def _read(self, tensor: Tensor, text: int, kwargs: Options) -> Tensor:
        """``tensor`` with the picture tokens of the source rows behind each row's own text."""
        read = tensor[self.sources]
        axis = 2 if kwargs.get("skip_reshape") else 1
        read.narrow(axis, 0, text).copy_(tensor.narrow(axis, 0, text))
        return read
