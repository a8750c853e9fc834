"""Attention hooks as ComfyUI's attention patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import torch
from torch import Tensor

from ....core.errors import RetraceError, UnsupportedModel
from ....core.host import AttentionCall, AttentionHook, Row
from ..plain import alias
from ..types import Network, Options
from .unet import AttentionLayer, attention_layers


def install_attention(options: Options, network: Network, hook: AttentionHook) -> None:
    """Let every attention layer of ``network`` call ``hook`` when it runs with the model options ``options``.

    Core keeps one replacement per layer. One that is there already (another pack's, or an earlier hook) becomes what
    ``AttentionCall.attend`` does.
    """
    transformer = options["transformer_options"] = {**options.get("transformer_options", {})}
    replace = transformer["patches_replace"] = {**transformer.get("patches_replace", {})}
    moment = _Moment()
    for layer in attention_layers(network):
        patches = replace[layer.patch] = {**replace.get(layer.patch, {})}
        earlier = patches.get(layer.key, patches.get(layer.key[:2]))
        patches[layer.key] = _Replacement(layer, hook, earlier, moment)


class NoiseLevel:
    """The noise level of the running pass; read once, because reading it waits for the GPU."""

    def __init__(self) -> None:
        self._sigmas: Tensor | None = None
        self._sigma = 0.0

    def sigma(self, sigmas: Tensor) -> float:
        """That of core's ``sigmas`` ``[rows]``, which are the same tensor in every layer of a pass."""
        if sigmas is not self._sigmas:
            self._sigmas, self._sigma = sigmas, float(sigmas[0])
        return self._sigma


class _Moment(NoiseLevel):
    """What the layers of the running pass share."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[tuple[int, ...], int], tuple[Row, ...]] = {}

    def rows(self, conds: tuple[int, ...], rows: int) -> tuple[Row, ...]:
        key = (conds, rows)
        if key not in self._rows:
            images = rows // len(conds)
            self._rows[key] = tuple(Row(cond, image) for cond in conds for image in range(images))
        return self._rows[key]


class _Replacement:
    """What core calls in place of one attention layer, with ``[rows, N, heads * dim]`` tensors."""

    def __init__(self, layer: AttentionLayer, hook: AttentionHook, earlier: Any, moment: _Moment) -> None:
        self.layer = layer
        self.hook = hook
        self.earlier = earlier
        self.moment = moment

    def __deepcopy__(self, memo: dict[int, Any]) -> _Replacement:
        """Older cores copy model options deeply when a MODEL is cloned; a hook must stay the one that its owner has."""
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
        heads = self.layer.heads
        rows, _, height, width = extra["activations_shape"]
        if q.shape[0] != rows or q.shape[1] != height * width:
            raise UnsupportedModel(
                f"Attention in block '{self.layer.block}' runs on {q.shape[0]} x {q.shape[1]} tokens instead of "
                f"{rows} x {height * width}: another node merges or tiles them (Token Merging, HyperTile). "
                "Remove that node in front of this one."
            )
        call = AttentionCall(
            kind=self.layer.kind,
            block=self.layer.block,
            index=self.layer.index,
            height=height,
            width=width,
            rows=self.moment.rows(tuple(extra["cond_or_uncond"]), rows),
            sigma=self.moment.sigma(extra["sigmas"]),
            attend=self._attend(extra),
        )
        inference = torch.is_inference_mode_enabled()
        if not inference:
            out = self.hook(call, _split(q, heads), _split(k, heads), _split(v, heads))
        else:  # hooks see ordinary tensors, which they may keep for later
            with torch.inference_mode(False), torch.no_grad():
                out = self.hook(call, *(_split(alias(tensor), heads) for tensor in (q, k, v)))
        if out.shape[0] != rows or out.shape[1] != heads or out.shape[2] != q.shape[1]:
            raise RetraceError(
                f"The attention hook returned {tuple(out.shape)} for queries of shape "
                f"{(rows, heads, q.shape[1], q.shape[2] // heads)}; it must return the shape of q."
            )
        return _join(out).to(q.dtype)

    def _attend(self, extra: Options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        inference = torch.is_inference_mode_enabled()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = q.shape[1]
            # Core's function and other packs' patches run in the mode they were called in.
            with torch.inference_mode(inference), torch.set_grad_enabled(not inference and grad):
                if self.earlier is not None:
                    out = self.earlier(_join(q), _join(k), _join(v), extra)
                else:
                    out = comfy.ldm.modules.attention.optimized_attention(
                        _join(q),
                        _join(k),
                        _join(v),
                        heads,
                        attn_precision=extra.get("attn_precision"),
                        transformer_options=extra,
                    )
            return _split(alias(out), heads)

        grad = torch.is_grad_enabled()
        return attend


def _split(tensor: Tensor, heads: int) -> Tensor:
    """``[rows, N, heads * dim]`` as ``[rows, heads, N, dim]``."""
    split: Tensor = tensor.unflatten(2, (heads, -1)).transpose(1, 2)
    return split


def _join(tensor: Tensor) -> Tensor:
    """``[rows, heads, N, dim]`` as ``[rows, N, heads * dim]``."""
    return tensor.transpose(1, 2).flatten(2)
