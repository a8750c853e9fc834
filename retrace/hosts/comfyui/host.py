"""ComfyUI's MODEL, CLIP and VAE as one Host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...errors import InvalidImage, RetraceError
from ...host import Conditioning, Denoiser, Parametrisation
from . import plain, sampling
from .conditioning import ComfyConditioning
from .denoiser import ComfyDenoiser

T = TypeVar("T")


class ComfyHost:
    """The Host protocol over ComfyUI. ``clip`` and ``vae`` are needed only by the calls that use them.

    A LATENT socket carries the VAE's scale, every latent of the protocol the model's: :meth:`to_model_scale` and
    :meth:`from_model_scale` convert, and nothing else in this class scales a latent that it is given.
    """

    name = "comfyui"

    def __init__(self, model: Any, clip: Any = None, vae: Any = None) -> None:
        """``model`` is a MODEL (ModelPatcher). Raises :class:`~retrace.errors.UnsupportedModel` for predictions other
        than eps, v and flow."""
        self.model = model
        self.clip = clip
        self.vae = vae
        self.parametrisation: Parametrisation = sampling.parametrisation(self._sampling)
        self.latent_channels = int(self._format.latent_channels)
        self._running: Any = None  # the patcher of the run in progress, which must stay loaded beside the VAE

    @property
    def _sampling(self) -> Any:
        return self.model.get_model_object("model_sampling")

    @property
    def _format(self) -> Any:
        return self.model.get_model_object("latent_format")

    @property
    def downscale(self) -> int:
        """Image pixels per latent cell."""
        if self.vae is not None:
            return int(self.vae.spacial_compression_encode())
        return int(getattr(self._format, "spacial_downscale_ratio", 8))

    def training_sigmas(self) -> Tensor:
        """Noise levels of the training timesteps, ascending ``[T]``."""
        return sampling.training_sigmas(self._sampling)

    def sigmas(self, scheduler: str, steps: int) -> Tensor:
        """Descending noise levels of core's scheduler of that name, the last one 0 (see ``scheduled_sigmas``)."""
        return sampling.scheduled_sigmas(self._sampling, scheduler, steps)

    def to_model_scale(self, samples: Tensor) -> Tensor:
        """``samples`` of a LATENT socket in the model's scale. Like core, leaves an empty (all-zero) latent alone."""
        if not bool(torch.count_nonzero(samples)):
            return samples.clone()
        return self._format.process_in(samples)  # type: ignore[no-any-return]

    def from_model_scale(self, latent: Tensor) -> Tensor:
        """A latent of the protocol as ``samples`` for a LATENT socket."""
        return self._format.process_out(latent)  # type: ignore[no-any-return]

    def encode_text(self, prompt: str) -> Any:
        """The prompt as CONDITIONING, with the syntax that core's text encode node understands."""
        clip = self._need("clip", "encode a prompt")
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents (posterior mean) ``[B, C, h, w]``.

        Core tiles when memory is short. Raises :class:`~retrace.errors.InvalidImage` for other shapes and for sizes the VAE would crop.
        """
        vae = self._need("vae", "encode an image")
        if image.ndim != 4 or image.shape[-1] < 3:
            raise InvalidImage(
                f"An image of shape {tuple(image.shape)} arrived; [B, H, W, 3] with values in 0..1 is needed."
            )
        cell = self.downscale
        if image.shape[1] % cell or image.shape[2] % cell:
            raise InvalidImage(
                f"The image is {image.shape[2]} x {image.shape[1]} pixels; both must be multiples of {cell} "
                "for this VAE. Resize or crop it first."
            )
        return self._format.process_in(vae.encode(image[..., :3]))  # type: ignore[no-any-return]

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, H, W, 3]`` in 0..1, tiled by core if memory is short."""
        return self._need("vae", "decode a latent").decode(self.from_model_scale(latent))  # type: ignore[no-any-return]

    def run(
        self,
        latent: Tensor,
        conds: Mapping[str, Any],
        method: Callable[[Denoiser, Tensor, Mapping[str, Conditioning]], T],
        *,
        gradients: bool = False,
    ) -> T:
        """Load the model as core's samplers do and call ``method(denoiser, latent, conditions)``; see the protocol.

        ``latent`` ``[B, C, h, w]`` is in the model's scale and reaches the method unchanged, as float32 on the device.
        ``conds`` are CONDITIONING lists; areas, masks, ControlNets, hooks, size ids and long prompts work as in core.
        """
        self._check(latent)
        patcher = self.model
        sampler = _MethodSampler(self, latent, method, gradients)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds(dict(conds))
        # Core scales what it is given by process_latent_in, for inpainting models; the method gets `latent` itself.
        image = self.from_model_scale(latent)
        levels = torch.tensor([float(self._sampling.sigma_max), 0.0])
        before = self._running
        try:
            guider.sample(torch.zeros_like(image), image, sampler, levels, disable_pbar=True)
        finally:
            self._running = before
        return sampler.outcome  # type: ignore[no-any-return]

    def _check(self, latent: Tensor) -> None:
        if getattr(latent, "is_nested", False) or latent.ndim != 4 or latent.shape[1] != self.latent_channels:
            raise InvalidImage(
                f"A latent of shape {tuple(latent.shape)} arrived; this model needs [B, {self.latent_channels}, h, w]. "
                "Encode the image with the VAE that belongs to the model."
            )

    def _need(self, part: str, purpose: str) -> Any:
        value = getattr(self, part)
        if value is None:
            raise RetraceError(
                f"No {part.upper()} is connected, and one is needed to {purpose}. Connect it to this node."
            )
        return value


class _MethodSampler(comfy.samplers.Sampler):  # type: ignore[misc]
    """A "sampler" that lets a method drive the model, so that core does everything around it."""

    def __init__(self, host: ComfyHost, latent: Tensor, method: Callable[..., Any], gradients: bool) -> None:
        self.host = host
        self.latent = latent
        self.method = method
        self.gradients = gradients
        self.outcome: Any = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by core's guider with the model loaded; keeps what the method returns in :attr:`outcome`."""
        self.host._running = model_wrap.model_patcher
        with torch.inference_mode(False), torch.no_grad():
            denoiser = ComfyDenoiser(
                model_wrap.model_patcher,
                model_wrap.inner_model,
                extra_args["model_options"],
                self.host.parametrisation,
                self.gradients,
            )
            conds = {
                name: ComfyConditioning.prepared(entries, denoiser.device) for name, entries in model_wrap.conds.items()
            }
            latent = plain.alias(self.latent.detach()).to(denoiser.device, torch.float32, copy=True)
            outcome = self.method(denoiser, latent, conds)
            self.outcome = plain.result(outcome, comfy.model_management.intermediate_device())
        return noise
