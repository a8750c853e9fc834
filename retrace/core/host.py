"""The Host protocol: all that an editing method may ask of a model.

Methods are plain functions of a :class:`Denoiser`, ``D(x, sigma, cond)``. A host (ComfyUI, diffusers) opens a denoiser
with :meth:`Host.run`, after it has moved the weights to the device and prepared the conditioning.

Noisy latents follow k-diffusion: ``x = x0 + sigma * noise`` for eps and v models, ``x = (1 - sigma) * x0 + sigma *
noise`` for flow models. All latents here are in the model's own scale (the VAE scale factor is already applied).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from .prompt import Prompt

Parametrisation = Literal["eps", "v", "flow"]
T = TypeVar("T")


class Conditioning(Protocol):
    """A text condition of one host: embedding, pooled vector, size ids, areas, whatever that host supports."""

    @property
    def embedding(self) -> Tensor:
        """Token embeddings ``[B, T, D]`` (B is 1 or the number of images)."""
        ...

    def with_embedding(self, embedding: Tensor) -> Conditioning:
        """The same condition with other token embeddings; gradients flow to them."""
        ...


@dataclass(frozen=True)
class Row:
    """What one batch row of an attention call belongs to: condition number ``cond`` of image ``image``.

    ``cond`` counts the conditions in the order they were given to :meth:`Denoiser.denoised_each` (or, inside a core
    ComfyUI sampler, 0 = positive and 1 = negative).
    """

    cond: int
    image: int


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer about to run."""

    kind: Literal["self", "cross"]
    block: str  # "down.0", "mid.0", "up.2": names of diffusers, without the "_blocks"
    index: int  # running number of the transformer block in the network, in the order it runs
    height: int  # resolution of the queries
    width: int
    rows: tuple[Row, ...]
    sigma: float
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # what the layer would do: softmax(q k^T / sqrt(d)) v


class AttentionHook(Protocol):
    """Replaces attention layers: q ``[rows, heads, N, dim]``, k and v ``[rows, heads, M, dim]``; returns q's shape."""

    def __call__(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LowRank:
    """A change of one linear map by a product of two small ones, ``y + up(down(x))`` (Hu et al. 2022, eq. 3)."""

    down: Tensor  # [rank, inputs of the map]
    up: Tensor  # [outputs of the map, rank]


@runtime_checkable
class Denoiser(Protocol):
    """A model that is loaded and ready: ``D(x, sigma, cond)``, an estimate of the clean latent."""

    parametrisation: Parametrisation
    device: torch.device
    evaluations: int  # network forward passes so far, counted per sample and condition

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Conditioning) -> Tensor:
        """The clean estimate ``[B, C, h, w]`` for ``x`` at noise level ``sigma`` (scalar or ``[B]``)."""
        ...

    def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: Sequence[Conditioning]) -> list[Tensor]:
        """One estimate per condition, in one batch where the host and its memory allow."""
        ...

    def differentiable(self, *, recompute: bool = False) -> AbstractContextManager[None]:
        """Inside, gradients flow from :meth:`denoised` to ``x`` and to embeddings; the weights never require them.

        With ``recompute`` the network keeps the inputs of its blocks only, and computes the rest again on the way back
        (Chen et al. 2016): a fraction of the memory for a third more time. Go back inside the same block.
        """
        ...

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        """Report that ``step`` of ``total`` is done, show ``denoised`` as a preview, and stop if the user asked to."""
        ...


class Attention(Protocol):
    """A network whose attention layers can be replaced while it runs."""

    def attention(self, hook: AttentionHook) -> AbstractContextManager[None]:
        """Inside, every attention layer calls ``hook``."""
        ...


class Adapters(Protocol):
    """A network whose linear maps can be changed by low-rank products while it runs."""

    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear maps of all attention layers by name, each with its ``(outputs, inputs)``, in the order they run.

        Names are equal in all hosts: ``"up.1.12.attn2.k"`` is the projection to keys in the cross-attention of
        transformer block 12 of the network, which lies in ``up.1`` (q, k, v and out; attn1 is self-attention).
        Raises :class:`UnsupportedModel` for models without such names.
        """
        ...

    def adapters(self, adapters: Mapping[str, LowRank]) -> AbstractContextManager[None]:
        """Inside, these projections are changed; the weights stay as they are. May be nested: changes add up.

        Inside :meth:`Denoiser.differentiable` gradients flow to those of their tensors that require them. Raises
        :class:`UnsupportedModel` for a name or a shape that the model does not have.
        """
        ...


class Features(Protocol):
    """A network whose blocks can be looked into while it runs."""

    blocks: tuple[str, ...]  # whose outputs can be asked for: "mid.0", "up.0" ..., in the order they run

    def features(self, blocks: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Inside, the outputs ``[rows, C, h, w]`` of these blocks (``"mid.0"``, ``"up.0"`` ...), newest last."""
        ...

    def features_of(self, x: Tensor, sigma: Tensor | float, cond: Conditioning, block: str) -> Tensor:
        """The output ``[B, C, h, w]`` of one block for ``x`` at noise level ``sigma``; the network is cut after it.

        Costs what the network needs up to there, forward and backward, and counts as an evaluation.
        """
        ...


class AttentionDenoiser(Denoiser, Attention, Protocol):
    """What methods of attention need."""


class AdapterDenoiser(Denoiser, Adapters, Protocol):
    """What training an adapter needs."""


class FeatureDenoiser(Denoiser, Features, Protocol):
    """What methods of feature maps need."""


class UNetDenoiser(AttentionDenoiser, AdapterDenoiser, FeatureDenoiser, Protocol):
    """All of it. Models that are no UNet of the SD1.5 or SDXL kind refuse what they have not."""


class Host(Protocol):
    """A model with its text encoder and VAE, in whatever framework loaded it."""

    name: str
    parametrisation: Parametrisation
    latent_channels: int
    latent_format: str  # equal for models whose latents mean the same: "4 channels, scale 0.18215"

    @property
    def downscale(self) -> int:
        """Image pixels per latent cell."""
        ...

    def training_sigmas(self) -> Tensor:
        """Noise levels of the training timesteps, ascending ``[T]``."""
        ...

    def sigmas(self, scheduler: str, steps: int) -> Tensor:
        """``[steps + 1]`` descending noise levels of the host's scheduler of that name, the last one 0."""
        ...

    def fingerprint(self) -> str:
        """A short digest of weights and configuration: equal for equal models."""
        ...

    def encode_text(self, prompt: str | Sequence[str]) -> Any:
        """The raw condition of one prompt, or of several, one for each image of a batch."""
        ...

    def read_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """The words of ``prompts`` and their places in what :meth:`encode_text` makes of all of them."""
        ...

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents (posterior mean) ``[B, C, h, w]``."""
        ...

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, H, W, 3]`` in 0..1."""
        ...

    def decode_differentiable(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, 3, H, W]`` around -1..1, unclamped, with gradients to ``latent``."""
        ...

    def private_decoder(self, latent: Tensor) -> AbstractContextManager[nn.Module]:
        """Inside, a copy of the VAE's decoder in float32, for latents like this one, that may be trained.

        Called as ``decoder(latent)`` outside inference mode it gives images ``[1, 3, H, W]`` around -1..1, unclamped.
        The weights that require gradients are the decoder's own; the VAE itself stays as it is, and the copy ends with
        the block. Raises :class:`UnsupportedModel` for a VAE without such a decoder.
        """
        ...

    def run(
        self,
        latent: Tensor,
        conds: Mapping[str, Any],
        method: Callable[[UNetDenoiser, Tensor, Mapping[str, Conditioning]], T],
        *,
        gradients: bool = False,
    ) -> T:
        """Load the model for latents of this shape and call ``method(denoiser, latent, conditions)``.

        ``conds`` holds this host's raw text conditions by name; the method gets them prepared under the same names.
        ``gradients=True`` prepares the weights so that the method may enter :meth:`Denoiser.differentiable`; without it
        that raises :class:`RetraceError`. The method runs with autograd off, outside inference mode: no
        tensor it sees is an inference tensor. Tensors in what it returns come back detached, on the CPU.
        """
        ...


@dataclass(frozen=True)
class Origin:
    """Which model made something: its fingerprint, and what the numbers of its latents mean. Empty where not known."""

    fingerprint: str = ""
    latent_format: str = ""

    @classmethod
    def of(cls, host: Host) -> Origin:
        """The model of ``host``."""
        return cls(host.fingerprint(), host.latent_format)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float, parametrisation: Parametrisation) -> Tensor:
    """The forward process: ``x0`` brought to noise level ``sigma``."""
    if parametrisation == "flow":
        return (1 - sigma) * x0 + sigma * noise
    return x0 + sigma * noise


def picture_share(sigma: float, parametrisation: Parametrisation) -> float:
    """How much of the clean latent is in a noisy one at level ``sigma``."""
    return 1 - sigma if parametrisation == "flow" else 1.0


def variance_scale(sigma: float, parametrisation: Parametrisation) -> float:
    """What divides a noisy latent to give it the variance that a network sees (1 for flow models, which keep it)."""
    return 1.0 if parametrisation == "flow" else math.sqrt(1 + sigma * sigma)


def to_variance_preserving(x: Tensor, sigma: float, parametrisation: Parametrisation) -> Tensor:
    """A noisy latent of ours in the scale of DDPM's papers, ``z = x / sqrt(1 + sigma^2)``; the same for flow models."""
    return x / variance_scale(sigma, parametrisation)


def from_variance_preserving(z: Tensor, sigma: float, parametrisation: Parametrisation) -> Tensor:
    """A noisy latent of DDPM's papers in ours, ``x = z sqrt(1 + sigma^2)``."""
    return z * variance_scale(sigma, parametrisation)


def guided(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on clean estimates (Ho & Salimans 2022, eq. 6; linear, so eps and x0 agree)."""
    return uncond + scale * (cond - uncond)
