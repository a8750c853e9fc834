"""ComfyUI's model as ``D(x, sigma, cond)``, through core's own batching of conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...core.errors import RetraceError
from ...core.host import AttentionHook, Conditioning, LowRank, Parametrisation
from ..common.adapters import adapted, shape_of
from ..common.cut import NetworkCut, cut_after
from ..common.recompute import recomputed
from .calls import NetworkCall
from .conditioning import ComfyConditioning
from .gradients import ConstantControl, constant_controls, differentiable_attention, gradient_mode, settle_hooks
from .network.attention import install_attention
from .network.features import FeatureRecorder
from .network.lora import projection_layers
from .network.unet import feature_blocks, feature_layer
from .plain import alias
from .types import Executor, Model, Options


class ComfyDenoiser:
    """The model that core has loaded for one :meth:`ComfyHost.run`. Latents are float32 in the model's scale."""

    def __init__(
        self, patcher: Model, model: Any, model_options: Options, parametrisation: Parametrisation, gradients: bool
    ) -> None:
        self.parametrisation = parametrisation
        self.device: torch.device = patcher.load_device
        self.evaluations = 0
        self.patcher = patcher
        self.model = model
        self.gradients = gradients
        self.blocks = feature_blocks(model.diffusion_model)
        self.options = comfy.model_patcher.create_model_options_clone(model_options)
        # Core would hand conditions to one thread per GPU, where neither hooks nor autograd could follow.
        self.options.pop("multigpu_clones", None)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL, "retrace", self._apply, self.options, is_model_options=True
        )
        self._recorders: list[FeatureRecorder] = []
        self._controls: dict[int, ConstantControl] = {}
        self._bar: Any = None
        self._previewer: Any = None

    def denoised(self, x: Tensor, sigma: Tensor | float, cond: Conditioning) -> Tensor:
        """The clean estimate ``[B, C, h, w]`` for ``x`` at noise level ``sigma`` (scalar or ``[B]``)."""
        return self.denoised_each(x, sigma, [cond])[0]

    def denoised_each(self, x: Tensor, sigma: Tensor | float, conds: Sequence[Conditioning]) -> list[Tensor]:
        """One estimate per condition; core batches them where memory and their kind allow."""
        entries = [_entries(cond) for cond in conds]
        levels = alias(torch.as_tensor(sigma, dtype=torch.float32, device=self.device))
        levels = levels.detach().expand(x.shape[0]).contiguous()
        x = alias(x).to(self.device, torch.float32)
        for recorder in self._recorders:
            recorder.begin()
        if torch.is_grad_enabled():
            settle_hooks(self.patcher, entries, levels, self.options)
            entries = constant_controls(entries, self._controls)
            estimates = comfy.samplers.calc_cond_batch(self.model, entries, x, levels, self.options)
        else:  # core's own buffers are inference tensors, and those may only be written in inference mode
            with torch.inference_mode():
                estimates = comfy.samplers.calc_cond_batch(self.model, entries, x, levels, self.options)
        for recorder in self._recorders:
            recorder.finish()
        return [alias(estimate) for estimate in estimates]

    def progress(self, step: int, total: int, denoised: Tensor | None = None) -> None:
        """Report that ``step`` of ``total`` is done; raises core's interrupt exception when the user pressed stop."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
            self._previewer = latent_preview.get_previewer(self.device, self.model.latent_format)
        preview = None
        if denoised is not None and self._previewer is not None:
            with torch.no_grad():
                preview = self._previewer.decode_latent_to_preview_image("JPEG", denoised.detach())
        self._bar.update_absolute(step, total, preview)

    @contextmanager
    def differentiable(self, *, recompute: bool = False) -> Iterator[None]:
        """Inside, gradients flow from :meth:`denoised` to ``x`` and to embeddings, but not into ControlNets.

        ``recompute`` saves memory, see the protocol; it has no effect on models without core's blocks of a UNet.
        Raises :class:`RetraceError` unless the run was opened with ``gradients=True``.
        """
        if not self.gradients:
            raise RetraceError("This run was opened without gradients. Call host.run(..., gradients=True).")
        options = comfy.model_patcher.create_model_options_clone(self.options)
        differentiable_attention(options)
        network = self.model.diffusion_model
        with self.with_options(options), gradient_mode(network), recomputed(network if recompute else None):
            yield

    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear maps of all attention layers by name, ``(outputs, inputs)``; see the protocol."""
        return {name: shape_of(layer) for name, layer in projection_layers(self.model.diffusion_model).items()}

    def adapters(self, adapters: Mapping[str, LowRank]) -> AbstractContextManager[None]:
        """Inside, these projections are changed; the weights stay as they are. See the protocol."""
        return adapted(projection_layers(self.model.diffusion_model), adapters, self.device)

    @contextmanager
    def attention(self, hook: AttentionHook) -> Iterator[None]:
        """Inside, every attention layer calls ``hook``. May be nested: the inner hook's ``attend`` is the outer hook.

        Raises :class:`UnsupportedModel` unless the model is a UNet of the SD1.5 or SDXL kind.
        """
        options = comfy.model_patcher.create_model_options_clone(self.options)
        install_attention(options, self.model.diffusion_model, hook)
        with self.with_options(options):
            yield

    @contextmanager
    def features(self, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Inside, the outputs ``[rows, C, h, w]`` of these blocks ("up.0" ..., "mid.0", "down.0" ...) are kept.

        The dictionary holds those of the newest call, rows in the order of its conditions and, for each, its images.
        Raises :class:`RetraceError` for a block that the model does not have.
        """
        recorder = FeatureRecorder(blocks)
        with recorder.hooked(self.model.diffusion_model):
            self._recorders.append(recorder)
            try:
                yield recorder.kept
            finally:
                self._recorders.remove(recorder)

    def features_of(self, x: Tensor, sigma: Tensor | float, cond: Conditioning, block: str) -> Tensor:
        """The output ``[B, C, h, w]`` of ``block``; the network is not run beyond it.

        Meant for conditions of one entry that holds for the whole image. Raises
        :class:`UnsupportedModel` without a UNet, RetraceError for a block that it does not have.
        """
        with cut_after(feature_layer(self.model.diffusion_model, block)):
            try:
                self.denoised(x, sigma, cond)
            except NetworkCut as cut:
                return alias(cut.output)[: x.shape[0]].float()
        raise RetraceError(f"The network ran without its block '{block}'. Another node may have replaced its forward.")

    @contextmanager
    def with_options(self, options: Options) -> Iterator[None]:
        """Inside, the network runs with ``options`` (a changed clone of :attr:`options`)."""
        before, self.options = self.options, options
        try:
            yield
        finally:
            self.options = before

    def _apply(self, executor: Executor, *args: Any, **kwargs: Any) -> Any:
        """Around every pass of the network: count its rows and say which conditions they belong to."""
        call = NetworkCall(args, kwargs)
        options: Options = call["transformer_options"] or {}
        self.evaluations += int(call["x"].shape[0])
        for recorder in self._recorders:
            recorder.observe(list(options.get("cond_or_uncond", [0])))
        return call.run(executor)


def _entries(cond: Conditioning) -> list[Options]:
    if not isinstance(cond, ComfyConditioning):
        raise RetraceError(
            f"ComfyUI's model cannot take a condition of type {type(cond).__name__}. Pass the conditions that run() "
            "hands to the method, or what with_embedding() makes of them."
        )
    return cond.entries
