"""The Host over the parts of a diffusers pipeline: Stable Diffusion 1.x, 2.x, XL, and Pebble, without ComfyUI."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import InvalidImage, UnsupportedModel, is_out_of_memory
from ...core.host import Conditioning, Parametrisation, UNetDenoiser
from ...core.prompt import Prompt
from ..common.private_decoder import private_decoder
from .denoiser import DiffusersDenoiser, ProgressCallback, detached, prepare
from .loading import Parts, load_parts
from .noise_schedule import SCHEDULERS, NoiseSchedule
from .text import TextCondition, TextEncoder
from .types import Vae

__all__ = ["SCHEDULERS", "DiffusersHost", "NoiseSchedule", "TextCondition", "best_device"]

T = TypeVar("T")
_SAMPLES = 32  # values taken from each weight tensor for the fingerprint
_TILE = 512  # pixels; the VAE of SDXL takes 1.5 GB for one in float32


def best_device() -> torch.device:
    """The fastest device of this machine: CUDA, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class DiffusersHost:
    """A Stable Diffusion model on one device.

    ``progress`` is called as ``progress(step, total, denoised)`` by every method that runs; an exception it raises
    stops the method. Make a host with :meth:`load`.
    """

    def __init__(self, parts: Parts, name: str, progress: ProgressCallback | None = None) -> None:
        kinds: dict[str, Parametrisation] = {"epsilon": "eps", "v_prediction": "v"}
        kind = parts.scheduler.get("prediction_type", "epsilon")
        if kind not in kinds or "FlowMatch" in str(parts.scheduler.get("_class_name", "")):
            scheduler = parts.scheduler.get("_class_name", "an unnamed scheduler")
            raise UnsupportedModel(
                f"{name} predicts '{kind}' with {scheduler}; this host runs models "
                "that predict epsilon or v_prediction. Use flow models in ComfyUI."
            )
        self.name = name
        self.parametrisation = kinds[kind]
        self.progress = progress
        self.unet, self.vae = parts.unet, parts.vae
        self.latent_channels = int(parts.vae.config.latent_channels)
        self.downscale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        self.native_size = int(parts.unet.config.sample_size or 64) * self.downscale
        self._text = TextEncoder(parts.text_encoders, parts.tokenizers, self.device)
        self._schedule = NoiseSchedule.from_config(parts.scheduler)
        self._scale = float(parts.vae.config.scaling_factor)
        self.latent_format = f"{self.latent_channels} channels, scale {self._scale:.5g}"
        self._shift = float(parts.vae.config.shift_factor or 0.0)
        self._fingerprint: str | None = None

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: ProgressCallback | None = None,
    ) -> DiffusersHost:
        """Load a diffusers folder or a ``.safetensors`` checkpoint; ``None`` is Pebble. Nothing is ever downloaded.

        ``device`` is by default the fastest one, ``dtype`` float16 on CUDA and float32 elsewhere; the VAE stays
        float32, because in half precision that of SDXL overflows. On CUDA the text encoders wait on the CPU, and the
        VAE takes the images of a batch one by one; where it still runs out of memory it goes on in tiles.

        Raises:
            InvalidFile: nothing there, unreadable or incomplete.
            UnsupportedModel: not a text-to-image model of SD 1.x, 2.x or XL.
            MissingPackage: diffusers or transformers is not installed.
        """
        target = torch.device(device) if device is not None else best_device()
        precision = dtype or (torch.float16 if target.type == "cuda" else torch.float32)
        location = Path(path) if path is not None else None
        parts = load_parts(location, precision)
        with torch.inference_mode(False):
            for module in (parts.unet, parts.vae, *(parts.text_encoders if target.type != "cuda" else ())):
                module.to(target)
        if target.type == "cuda":
            parts.vae.enable_slicing()
        return cls(parts, location.name if location else "Pebble", progress)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def training_sigmas(self) -> Tensor:
        """Noise levels of the training timesteps, ascending ``[T]``."""
        return self._schedule.sigmas.clone()

    def sigmas(self, scheduler: str, steps: int) -> Tensor:
        """``[steps + 1]`` descending noise levels of the scheduler of that name, the last one 0.

        Raises:
            InvalidSchedule: an unknown name, or fewer than 1 step.
        """
        return self._schedule.steps(scheduler, steps)

    def fingerprint(self) -> str:
        """A short digest of weights and configuration: equal for equal models, whatever precision they run in."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self.parametrisation.encode())
            digest.update(self._schedule.sigmas.numpy().tobytes())
            for name, weight in sorted(self.unet.state_dict().items()):
                flat = weight.flatten()
                some = flat[:: max(len(flat) // _SAMPLES, 1)][:_SAMPLES]
                digest.update(f"{name}{tuple(weight.shape)}".encode())
                digest.update(some.to("cpu", torch.float16).numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def encode_text(self, prompt: str | Sequence[str]) -> TextCondition:
        """The condition for ``prompt``, or for a list of them, one for each image of a batch.

        Longer prompts go in chunks of 75 tokens; brackets are plain text.
        """
        with torch.inference_mode(False):
            return self._text([prompt] if isinstance(prompt, str) else prompt)

    def read_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """The words of ``prompts`` and their places in what :meth:`encode_text` makes of all of them."""
        return self._text.read(prompts)

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents (posterior mean) ``[B, C, h, w]``.

        Raises:
            InvalidImage: another shape, sides that are no multiple of :attr:`downscale`, NaN.
        """
        if image.ndim != 4 or image.shape[-1] != 3:
            raise InvalidImage(f"The VAE got an image of shape {list(image.shape)}; it needs RGB [B, H, W, 3].")
        if any(side % self.downscale or side == 0 for side in image.shape[1:3]):
            raise InvalidImage(
                f"The VAE got an image of {image.shape[2]} x {image.shape[1]} px; both sides must be multiples of "
                f"{self.downscale}. Resize or crop it first."
            )
        if not bool(torch.isfinite(image).all()):
            raise InvalidImage("The VAE got an image with NaN or infinite values. Look for them where it was made.")
        with torch.inference_mode(False), torch.no_grad():
            pixels = (image * 2 - 1).movedim(-1, 1).to(self.device, torch.float32)
            mean = self._with_room(lambda: self.vae.encode(pixels).latent_dist.mode())
            return (mean - self._shift) * self._scale

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, H, W, 3]`` in 0..1."""
        with torch.inference_mode(False), torch.no_grad():
            return (self._decode(latent) / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def decode_differentiable(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, 3, H, W]`` around -1..1, unclamped, with gradients to ``latent``."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._decode(latent.clone() if latent.is_inference() else latent)

    @contextmanager
    def private_decoder(self, latent: Tensor) -> Iterator[nn.Module]:
        """A copy of the VAE's decoder to train on latents like this one; see the protocol."""

        def decode(vae: Vae, given: Tensor) -> Tensor:
            return vae.decode(given / self._scale + self._shift, return_dict=False)[0]  # type: ignore[no-any-return]

        def whole(vae: Vae) -> None:
            vae.disable_tiling()

        with private_decoder(self.vae, self.device, decode, whole) as decoder:
            yield decoder

    def _decode(self, latent: Tensor) -> Tensor:
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels:
            raise InvalidImage(
                f"The VAE got a latent of shape {list(latent.shape)}; it needs [B, {self.latent_channels}, h, w]."
            )
        given = latent.to(self.device, torch.float32) / self._scale + self._shift
        return self._with_room(lambda: self.vae.decode(given, return_dict=False)[0])

    def _with_room(self, work: Callable[[], Tensor]) -> Tensor:
        """``work``, a call of the VAE; where memory does not suffice again in tiles, which blend at their seams."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error) or self.vae.use_tiling:
                raise
        # Out here, where the failed call no longer holds its tensors.
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = _TILE, _TILE // self.downscale
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return work()

    def run(
        self,
        latent: Tensor,
        conds: Mapping[str, Any],
        method: Callable[[UNetDenoiser, Tensor, Mapping[str, Conditioning]], T],
        *,
        gradients: bool = False,
    ) -> T:
        """Call ``method(denoiser, latent, conditions)`` with everything on the model's device.

        Autograd is off until the method enters ``differentiable``, which needs ``gradients=True``. Tensors in what it
        returns come back detached, on the CPU.

        Raises:
            InvalidImage: ``latent`` is not ``[B, C, h, w]`` with the model's channels, or holds NaN.
            RetraceError: a condition that :meth:`encode_text` did not make.
        """
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels:
            raise InvalidImage(
                f"{self.name} got a latent of shape {list(latent.shape)}; it needs [B, {self.latent_channels}, h, w]."
            )
        if not bool(torch.isfinite(latent).all()):
            raise InvalidImage("The latent holds NaN or infinite values. Look for them where it was made.")
        denoiser = DiffusersDenoiser(
            self.unet, self._schedule, self.parametrisation, self.downscale, self.progress, gradients
        )
        # Ordinary tensors, also where the caller is in inference mode, as ComfyUI is: a method may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            own = latent.detach().to(self.device, torch.float32, copy=True)
            return detached(method(denoiser, own, prepare(conds, self.device)))
