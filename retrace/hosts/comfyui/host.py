"""ComfyUI's MODEL, CLIP and VAE as one Host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor, nn

from ...core.errors import InvalidImage, RetraceError
from ...core.host import Conditioning, Parametrisation, UNetDenoiser
from ...core.prompt import Prompt
from . import gradients as gradient_modes
from . import plain, sampling
from .autoencoder import ComfyAutoencoder
from .conditioning import ComfyConditioning
from .denoiser import ComfyDenoiser
from .fingerprint import fingerprint as model_fingerprint
from .prompts import TokenisedPrompts
from .types import Clip, ConditioningList, Model, ModelSampling, Network, Options, Vae

T = TypeVar("T")


class ComfyHost:
    """The Host protocol over ComfyUI. ``clip`` and ``vae`` are needed only by the calls that use them.

    A LATENT socket carries the VAE's scale, every latent of the protocol the model's: :meth:`to_model_scale` and
    :meth:`from_model_scale` convert, and nothing else in this class scales a latent that it is given.
    """

    name = "comfyui"

    def __init__(self, model: Model, clip: Clip = None, vae: Vae = None) -> None:
        """``model`` is a MODEL (ModelPatcher). Raises :class:`UnsupportedModel` for predictions other
        than eps, v and flow."""
        self.model = model
        self.clip = clip
        self.vae = vae
        self.parametrisation: Parametrisation = sampling.parametrisation(self.model_sampling)
        self.latent_channels = int(self._format.latent_channels)
        scale = getattr(self._format, "scale_factor", 1.0)
        self.latent_format = f"{self.latent_channels} channels, scale {float(scale):.5g}"
        self._model_clone: Any = None  # the same weights with wrappers, made when gradients are first asked for
        self._vae_clone: Any = None
        self._running: Any = None  # the patcher of the run in progress, which must stay loaded beside the VAE

    @property
    def model_sampling(self) -> ModelSampling:
        """Core's noise schedule of the model, with what nodes patched into it."""
        return self.model.get_model_object("model_sampling")

    @property
    def network(self) -> Network:
        """The diffusion network itself."""
        return self.model.model.diffusion_model

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
        return sampling.training_sigmas(self.model_sampling)

    def sigmas(self, scheduler: str, steps: int) -> Tensor:
        """Descending noise levels of core's scheduler of that name, the last one 0 (see ``scheduled_sigmas``)."""
        return sampling.scheduled_sigmas(self.model_sampling, scheduler, steps)

    def fingerprint(self) -> str:
        """A short digest of weights, LoRAs and prediction: equal for equal models (see ``fingerprint.py``)."""
        return model_fingerprint(self.model)

    def to_model_scale(self, samples: Tensor) -> Tensor:
        """``samples`` of a LATENT socket in the model's scale. Like core, leaves an empty (all-zero) latent alone."""
        if not bool(torch.count_nonzero(samples)):
            return samples.clone()
        return self._format.process_in(samples)  # type: ignore[no-any-return]

    def from_model_scale(self, latent: Tensor) -> Tensor:
        """A latent of the protocol as ``samples`` for a LATENT socket."""
        return self._format.process_out(latent)  # type: ignore[no-any-return]

    def encode_text(self, prompt: str | Sequence[str]) -> ConditioningList:
        """The prompt as CONDITIONING, or several for the images of a batch, with the syntax of core's text encode."""
        clip = self._need("clip", "encode a prompt")
        if not isinstance(prompt, str):
            return TokenisedPrompts(clip, prompt).encode()
        with torch.inference_mode():
            cond: ConditioningList = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        ordinary: ConditioningList = plain.change_tensors(cond, plain.alias)
        return ordinary

    def read_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """The words of ``prompts`` and their places in what :meth:`encode_text` makes of all of them."""
        return TokenisedPrompts(self._need("clip", "read a prompt"), prompts).read()

    def encode_image(self, image: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 to latents (posterior mean) ``[B, C, h, w]``.

        Core tiles when memory is short. Raises :class:`InvalidImage` for other shapes and for sizes
        that the VAE would crop.
        """
        latent = ComfyAutoencoder(self._need("vae", "encode an image")).encode_image(image)
        return plain.alias(self._format.process_in(latent))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, H, W, 3]`` in 0..1; core tiles when memory is short."""
        vae = self._need("vae", "decode a latent")
        with torch.inference_mode():
            image = vae.decode(self.from_model_scale(latent))
        return plain.alias(image)

    def decode_differentiable(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, 3, H, W]`` around -1..1, unclamped, with gradients to ``latent``.

        Never tiled: the whole graph has to fit into memory. Takes gradients only from a caller outside inference mode,
        as inside :meth:`run` or ``torch.inference_mode(False)``.
        """
        vae = self._need("vae", "decode a latent")
        self._clone_vae()
        memory = gradient_modes.GRAPH_MEMORY * vae.memory_used_decode(latent.shape, vae.vae_dtype)
        wanted = [self._vae_clone] if self._running is None else [self._running, self._vae_clone]
        with torch.inference_mode():
            comfy.model_management.load_models_gpu(wanted, memory_required=memory)
        with gradient_modes.gradient_mode(vae.first_stage_model):
            samples = self.from_model_scale(plain.alias(latent))
            return vae.first_stage_model.decode(samples.to(vae.device, vae.vae_dtype)).float()  # type: ignore[no-any-return]

    def beside(self, patcher: Any) -> ComfyHost:
        """This host for a run of ``patcher`` that core has begun: a decoding keeps that model loaded beside the VAE."""
        self._clone_vae()
        host = copy.copy(self)
        host._running = patcher
        return host

    def _clone_vae(self) -> None:
        if self._vae_clone is None and self.vae is not None:
            self._vae_clone = gradient_modes.gradient_clone(self.vae.patcher)

    @contextmanager
    def private_decoder(self, latent: Tensor) -> Iterator[nn.Module]:
        """A copy of the VAE's decoder to train on latents like this one; see the protocol."""
        autoencoder = ComfyAutoencoder(self._need("vae", "train a decoder"))
        with autoencoder.private_decoder(latent) as decoder:
            yield _Scaled(decoder, self.from_model_scale)

    def run(
        self,
        latent: Tensor,
        conds: Mapping[str, Any],
        method: Callable[[UNetDenoiser, Tensor, Mapping[str, Conditioning]], T],
        *,
        gradients: bool = False,
    ) -> T:
        """Load the model as core's samplers do and call ``method(denoiser, latent, conditions)``; see the protocol.

        ``latent`` ``[B, C, h, w]`` is in the model's scale and reaches the method unchanged, as float32 on the device.
        ``conds`` are CONDITIONING lists; areas, masks, ControlNets, hooks, size ids and long prompts work as in core.
        """
        self._check(latent)
        if gradients and self._model_clone is None:
            self._model_clone = gradient_modes.gradient_clone(self.model)
            self._model_clone.add_wrapper_with_key(
                comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, "retrace", gradient_modes.reserve_graph_memory
            )
        patcher = self._model_clone if gradients else self.model
        sampler = _MethodSampler(self, latent, method, gradients)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds(dict(conds))
        # Core scales what it is given by process_latent_in, for inpainting models; the method gets `latent` itself.
        image = self.from_model_scale(latent)
        levels = torch.tensor([float(self.model_sampling.sigma_max), 0.0])
        before = self._running
        try:
            guider.sample(torch.zeros_like(image), image, sampler, levels, disable_pbar=True)
        finally:
            self._running = before
        outcome: T = sampler.outcome
        return outcome

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


class _Scaled(nn.Module):
    """A decoder for latents of another scale."""

    def __init__(self, decoder: nn.Module, rescaled: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decoder = decoder
        self.rescaled = rescaled

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(self.rescaled(latent))  # type: ignore[no-any-return]


class _MethodSampler(comfy.samplers.Sampler):
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
        extra_args: Options,
        callback: Any,
        noise: Tensor,
        *_: object,
    ) -> Tensor:
        """Called by core's guider with the model loaded; keeps what the method returns in :attr:`outcome`.

        The latent, the mask and the progress bar that follow are for samplers that walk.
        """
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
