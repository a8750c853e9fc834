"""Background reconstruction: a private decoder learns the source around an edit (Avrahami et al. 2023, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..core.checks import (
    check_choice,
    check_image,
    check_mask,
    check_same_size,
    check_steps,
    check_whole,
    match_batch,
)
from ..core.errors import InvalidImage, InvalidSetting, RetraceError
from ..metrics.quality import decibel

Progress = Callable[[int, int, Tensor], None]
"""``progress(step, total, image)`` after every step, with the image ``[1, H, W, 3]`` in 0..1 as it is by then."""

Watch = Callable[[int, Tensor], None]
"""``watch(step, decoded)``, with what the decoder makes after ``step`` steps, ``[1, 3, H, W]`` around -1..1."""


Target = Literal["decoder", "latent"]


class Autoencoder(Protocol):
    """The part of a host that this method needs; every :class:`Host` is one."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents ``[B, C, h, w]``."""
        ...

    def private_decoder(self, latent: Tensor) -> AbstractContextManager[nn.Module]:
        """A copy of the decoder to train on latents like this one, see :meth:`Host.private_decoder`."""
        ...


@dataclass(frozen=True)
class Training:
    """How the background is learned. The defaults are those of the paper, apart from ``patience``.

    Args:
        steps: of Adam, at most.
        learning_rate: of Adam.
        weight: the lambda of the background.
        stop: ends it early, at this PSNR of the background in dB; 0 never does.
        patience: ends it after this many steps in a row without a lower loss; 0 never does.
        target: what is optimised: the weights of the ``"decoder"``, or the ``"latent"`` under a decoder as it is (the
            authors' other mode).

    Raises:
        InvalidSchedule: fewer than 0 steps.
        InvalidSetting: negative patience, a learning rate that is not above 0, a negative weight or stop, another
            target.
    """

    steps: int = 75
    learning_rate: float = 1e-4
    weight: float = 100.0
    stop: float = 0.0
    patience: int = 10
    target: Target = "decoder"

    def __post_init__(self) -> None:
        check_steps("steps", self.steps, minimum=0)
        check_whole("patience", self.patience, minimum=0)
        check_choice("target", self.target, get_args(Target))
        if not 0 < self.learning_rate < 1:
            raise InvalidSetting(
                f"learning_rate: got {self.learning_rate:g}, but a number above 0 and below 1 is needed (the paper has "
                "0.0001)."
            )
        for name in ("weight", "stop"):
            if not getattr(self, name) >= 0:
                raise InvalidSetting(f"{name}: got {getattr(self, name):g}, but 0 or more is needed.")

    @classmethod
    def reference(cls, target: Target = "decoder") -> Training:
        """What the authors' code does in its two modes (``weights``, ``latents``): 75 steps, all of them."""
        return cls(learning_rate=1e-4 if target == "decoder" else 0.1, patience=0, target=target)


@dataclass(frozen=True)
class Trained:
    """One image ``[1, 3, H, W]`` around -1..1, the Adam steps it took, and the PSNR of its background in dB."""

    decoded: Tensor
    steps: int
    before: float
    """with the decoder as it was"""
    after: float


@dataclass(frozen=True)
class Reconstruction:
    """The images ``[B, H, W, 3]`` in 0..1, and for each the steps and the PSNR of its background before and after."""

    image: Tensor
    steps: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    def text(self) -> str:
        """A line for each image."""
        rows = zip(self.before, self.after, self.steps, strict=True)
        return "\n".join(
            f"background of number {i}: {before:.2f} dB as decoded, {after:.2f} dB after {steps} steps"
            for i, (before, after, steps) in enumerate(rows)
        )


def reconstruct_background(
    autoencoder: Autoencoder,
    edited: Tensor,
    source: Tensor,
    mask: Tensor,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """``edited`` inside ``mask`` and ``source`` around it, both as one decoder makes them, so that no seam is left.

    The decoder is a private copy, a new one for each image; the model stays as it is. Outside the mask the result is
    close to the source and not equal to it: :func:`retrace.blending.paste.paste_background` makes it so.

    Args:
        edited: ``[B, H, W, 3]``, 0..1, of a size that the autoencoder takes.
        source: ``[B, H, W, 3]`` or one ``[1, H, W, 3]`` for all, 0..1.
        mask: ``[B, H, W]`` or one ``[1, H, W]`` for all, 1 = edit; values between mix. An empty mask asks for the
            source.
        progress: see :data:`Progress`; an exception it raises stops everything.

    Returns:
        Images of the type and device of ``edited``.

    Raises:
        InvalidImage: not images or a mask, different sizes, batches that do not fit, a mask without an outside.
        RetraceError: the loss became NaN, see :func:`train_decoder`.
        UnsupportedModel: the autoencoder has no decoder that can be trained.
    """
    training = training or Training()
    edited = check_image("edited image", edited)
    source = check_image("source image", source)
    check_same_size("edited image", edited, "the source image", source)
    mask = check_mask("mask", mask, size=(source.shape[1], source.shape[2]), allow_empty=True)
    batch = len(edited)
    source, mask = match_batch(source, batch, "source image"), match_batch(mask, batch, "mask")
    if bool((mask > 0).flatten(1).all(1).any()):
        raise InvalidImage(
            "mask: it is above 0 everywhere, so there is no background to reconstruct. Paint only the area to edit "
            "(1 = edit)."
        )
    latents = autoencoder.encode_image(edited)
    results = []
    for i in range(batch):

        def watch(step: int, decoded: Tensor, done: int = i * training.steps) -> None:
            if progress is not None:
                progress(done + step, batch * training.steps, _image(decoded))

        with torch.inference_mode(False), autoencoder.private_decoder(latents[i : i + 1]) as decoder:
            device = next(decoder.parameters()).device
            # Ordinary tensors, also where the caller is in inference mode.
            given, goal, kept, part = (
                tensor[i : i + 1].to(device, torch.float32, copy=True) for tensor in (latents, edited, source, mask)
            )
            goal, kept = (pixels.movedim(-1, 1) * 2 - 1 for pixels in (goal, kept))
            results.append(train_decoder(decoder, given, goal, kept, part[:, None], training, watch))
    return Reconstruction(
        torch.cat([_image(result.decoded) for result in results]).to(edited),
        *(tuple(getattr(result, name) for result in results) for name in ("steps", "before", "after")),
    )


def train_decoder(
    decoder: nn.Module,
    latent: Tensor,
    edited: Tensor,
    source: Tensor,
    mask: Tensor,
    training: Training,
    watch: Watch | None = None,
) -> Trained:
    """Adam on those weights of ``decoder`` that require gradients, or on the latent; the lowest loss is the result.

    Args:
        decoder: called as ``decoder(latent)``; its weights change, or no longer require gradients.
        latent: ``[1, C, h, w]``.
        edited, source: ``[1, 3, H, W]``, -1..1.
        mask: ``[1, 1, H, W]``, 0..1, with zeros somewhere.

    Raises:
        RetraceError: the loss is not finite any more.
    """
    if training.target == "latent":
        decoder.requires_grad_(False)
        latent = latent.clone().requires_grad_()
        trained: list[Tensor] = [latent]
    else:
        trained = [p for p in decoder.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=training.learning_rate)
    outside = (mask == 0).expand_as(source)
    best, lowest, before, after, waited = latent, math.inf, 0.0, 0.0, 0
    try:
        for step in range(training.steps + 1):
            last = step == training.steps
            with torch.set_grad_enabled(not last):
                decoded = decoder(latent)
                loss = reconstruction_loss(decoded, edited, source, mask, training.weight)
            value, shown = float(loss.detach()), decoded.detach()
            if not math.isfinite(value):
                raise RetraceError(
                    f"The decoder gives NaN or infinite values after {step} steps. Lower learning_rate (the paper's is "
                    "0.0001); if there is nothing left to lower, the VAE is broken."
                )
            quality = _psnr(shown[outside], source[outside])
            before = quality if step == 0 else before
            waited += 1
            if value < lowest:
                best, lowest, after, waited = shown, value, quality, 0
            if watch is not None:
                watch(step, shown)
            if last or 0 < training.stop <= quality or 0 < training.patience <= waited:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return Trained(best, step, before, after)
    finally:  # a traceback may keep this frame for long
        optimiser.zero_grad()
        optimiser.state.clear()


def reconstruction_loss(decoded: Tensor, edited: Tensor, source: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Mean squared difference from the edit inside, plus ``weight`` times that from the source outside.

    Avrahami et al. 2023, eq. 3, with squares; both means are over all elements of the image, as in the authors' code.
    All are ``[B, 3, H, W]`` in -1..1, the mask ``[B, 1, H, W]``.
    """
    inside = ((edited - decoded) * mask).square().mean()
    return inside + weight * ((source - decoded) * (1 - mask)).square().mean()


def _psnr(decoded: Tensor, source: Tensor) -> float:
    """PSNR in dB of values in -1..1, clamped as the image will be."""
    error = ((decoded.clamp(-1, 1) - source) / 2).square().mean()
    return float(decibel(error))


def _image(decoded: Tensor) -> Tensor:
    return (decoded / 2 + 0.5).clamp(0, 1).movedim(1, -1)
