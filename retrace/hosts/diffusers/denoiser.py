"""The x0-prediction of a diffusers UNet, as a function of x and sigma."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ...core.errors import InvalidImage, RetraceError
from ...core.host import AttentionHook, Conditioning, LowRank, Parametrisation, Row
from ..common.adapters import adapted, shape_of
from ..common.cut import NetworkCut, cut_after
from ..common.recompute import recomputed
from ..common.tensors import change_tensors
from .attention import Batch, attention_hook, feature_blocks, feature_hook, feature_layer
from .lora import projection_layers
from .noise_schedule import NoiseSchedule
from .text import TextCondition
from .types import UNet

T = TypeVar("T")
ProgressCallback = Callable[[int, int, Tensor | None], None]


class DiffusersDenoiser:
    """``D(x, sigma, cond)`` of a discrete eps or v model with a diffusers UNet."""

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        parametrisation: Parametrisation,
        downscale: int,
        progress: ProgressCallback | None = None,
        gradients: bool = False,
    ) -> None:
        self.parametrisation = parametrisation
        self.device: torch.device = unet.device
        self.evaluations = 0
        self.blocks = tuple(feature_blocks(unet))
        self._unet = unet
        self._schedule = schedule
        self._downscale = downscale
        self._progress = progress
        self._gradients = gradients
        self._batch = Batch()
        self._differentiable = False

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Conditioning) -> Tensor:
        """The clean estimate ``[B, C, h, w]`` for ``x`` at noise level ``sigma`` (scalar or ``[B]``)."""
        return self.denoised_each(x, sigma, [cond])[0]

    def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: Sequence[Conditioning]) -> list[Tensor]:
        """One estimate per condition; conditions with equally many tokens share a batch.

        Raises:
            InvalidImage: ``x`` is not ``[B, C, h, w]`` with the model's channels.
            RetraceError: the batch of a condition is neither 1 nor ``B``, or ``sigma`` has another length.
        """
        channels = self._unet.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise InvalidImage(f"The model got a latent of shape {list(x.shape)}; it needs [B, {channels}, h, w].")
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).flatten()
        if len(level) not in (1, len(x)):
            raise RetraceError(f"Got {len(level)} noise levels for {len(x)} latents; give one, or one per latent.")
        level = level.expand(len(x))
        texts = [cast(TextCondition, c) for c in conds]
        groups: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            if len(text.embedding) not in (1, len(x)):
                raise RetraceError(
                    f"A condition for {len(text.embedding)} images met {len(x)} latents; they must agree."
                )
            groups.setdefault(text.embedding.shape[1], []).append(number)
        with torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()):
            results: dict[int, Tensor] = {}
            for numbers in groups.values():
                self._batch.rows = tuple(Row(n, image) for n in numbers for image in range(len(x)))
                self._batch.sigma = float(level[0])
                together = self._predict(x, level, [texts[n] for n in numbers])
                results |= dict(zip(numbers, together.chunk(len(numbers)), strict=True))
        self.evaluations += len(x) * len(texts)
        return [results[n] for n in range(len(texts))]

    def _predict(self, x: Tensor, level: Tensor, texts: list[TextCondition]) -> Tensor:
        """Clean estimates ``[len(texts) * B, C, h, w]``, condition by condition."""
        count, (images, _, height, width) = len(texts), x.shape
        many = x.float().repeat(count, 1, 1, 1)
        sigma = level.repeat(count).reshape(-1, 1, 1, 1)
        scale = (sigma**2 + 1).sqrt()  # VE to the variance-preserving input that the network was trained on
        embedding = torch.cat([t.embedding.expand(images, -1, -1) for t in texts])
        added = None
        if getattr(self._unet.config, "addition_embed_type", None) == "text_time":
            pooled = torch.cat([cast(Tensor, t.pooled).expand(images, -1) for t in texts])
            pixels = [height * self._downscale, width * self._downscale]
            # SDXL (Podell et al. 2023, section 2.2): original size, crop offset, target size.
            ids = torch.tensor([*pixels, 0, 0, *pixels], dtype=embedding.dtype, device=x.device).expand(len(many), -1)
            added = {"text_embeds": pooled.to(self._unet.dtype), "time_ids": ids}
        output: Tensor = self._unet(
            (many / scale).to(self._unet.dtype),
            self._schedule.timestep(level.cpu()).to(x.device).repeat(count),
            encoder_hidden_states=embedding.to(self._unet.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
        if self.parametrisation == "v":
            # Salimans & Ho 2022 (arXiv 2202.00512), appendix D, with alpha = 1 / scale and the input x / scale.
            return (many / scale**2 - output * sigma / scale).to(x.dtype)
        return (many - output * sigma).to(x.dtype)

    @contextmanager
    def differentiable(self, *, recompute: bool = False) -> Iterator[None]:
        """Inside, gradients flow from :meth:`denoised` to ``x`` and to embeddings; the weights never require them.

        ``recompute`` saves memory, see the protocol.

        Raises:
            RetraceError: the run was not opened with ``gradients=True``.
        """
        if not self._gradients:
            raise RetraceError(
                "The method asks for gradients, but its run was opened without: host.run(gradients=True)."
            )
        before, self._differentiable = self._differentiable, True
        try:
            with torch.inference_mode(False), torch.enable_grad(), recomputed(self._unet if recompute else None):
                yield
        finally:
            self._differentiable = before

    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear maps of all attention layers by name, ``(outputs, inputs)``; see the protocol."""
        return {name: shape_of(layer) for name, layer in projection_layers(self._unet).items()}

    def adapters(self, adapters: Mapping[str, LowRank]) -> AbstractContextManager[None]:
        """Inside, these projections are changed; the weights stay as they are. See the protocol."""
        return adapted(projection_layers(self._unet), adapters, self.device)

    def attention(self, hook: AttentionHook) -> AbstractContextManager[None]:
        """Inside, every attention layer calls ``hook``."""
        return attention_hook(self._unet, hook, self._batch)

    def features(self, blocks: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Inside, the outputs ``[rows, C, h, w]`` of the blocks named are kept, newest last."""
        return feature_hook(self._unet, blocks)

    def features_of(self, x: Tensor, sigma: Tensor | float, cond: Conditioning, block: str) -> Tensor:
        """The output ``[B, C, h, w]`` of ``block``; the network is not run beyond it."""
        with cut_after(feature_layer(self._unet, block)):
            try:
                self.denoised(x, sigma, cond)
            except NetworkCut as cut:
                self.evaluations += len(x)
                return cut.output.float()
        raise AssertionError("unreachable: every block of a diffusers UNet runs")

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        """Tell the host's callback; an exception it raises stops the method."""
        if self._progress is not None:
            self._progress(step, total, denoised)


def prepare(conds: Mapping[str, Any], device: torch.device) -> dict[str, Conditioning]:
    """The conditions on the model's device.

    Raises:
        RetraceError: something that :meth:`DiffusersHost.encode_text` did not make.
    """
    for name, cond in conds.items():
        if not isinstance(cond, TextCondition):
            raise RetraceError(
                f"The condition '{name}' is a {type(cond).__name__}; this host needs what its encode_text returns."
            )
    return {name: cast(TextCondition, cond).to(device) for name, cond in conds.items()}


def detached(value: T) -> T:
    """``value`` with every tensor in it detached and on the CPU; containers and dataclasses are rebuilt."""
    return cast(T, change_tensors(value, lambda tensor: tensor.detach().cpu()))
