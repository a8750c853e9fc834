"""Reference KV Control under core's samplers: in UNets by their attention patches, in transformers by their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import comfy.patcher_extension
from torch import Tensor

from ....attention.reference_kv import ReferenceKV, default_first_layer, reference_rows
from ....core.errors import InvalidInput, InvalidSetting, UnsupportedModel
from ....core.host import Row
from ..calls import SamplerCall
from ..network.attention import install_attention
from ..network.joint_attention import install_exchange, joint_blocks
from ..network.unet import attention_layers
from ..types import Executor, Model, Network


def patch_reference_kv(
    model: Model, first_layer: int | None = None, *, start_percent: float = 0.0, end_percent: float = 1.0
) -> Model:
    """A clone of the MODEL whose samplers let the edits of a batch ``[reference, edit, ...]`` read the reference.

    Args:
        first_layer: running number of the first controlled layer; None is what :func:`first_layer_of` says.
        start_percent, end_percent: part of the noise levels during which it happens, as core counts them.

    Raises:
        InvalidSetting: a layer that the model does not have, or a window that ends before it starts.
        UnsupportedModel: a network whose attention is reached in neither way.
    """
    network = model.model.diffusion_model
    if not joint_blocks(network) and getattr(network, "input_blocks", None) is None:
        raise UnsupportedModel(
            f"The connected model is '{type(model.model).__name__}', whose self-attention cannot be reached safely. "
            "Connect an SD1.x, SD2.x, SDXL, Flux, Chroma, SD3 or Qwen-Image model."
        )
    layers = len(joint_blocks(network) or _unet_blocks(network))
    if first_layer is None:
        first_layer = first_layer_of(network)
    if not 0 <= first_layer < layers:
        raise InvalidSetting(
            f"first_layer is {first_layer}, but this model has {layers} self-attention layers: give a number from 0 to "
            f"{layers - 1}, or -1 to let the node choose."
        )
    if start_percent > end_percent:
        raise InvalidSetting(
            f"It starts at {start_percent:g} but ends at {end_percent:g}. Set end_percent above start_percent."
        )
    patched = model.clone()
    patch = _ReferencePatch(first_layer, start_percent, end_percent)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, _ReferencePatch.key, patch.sample)
    return patched


def first_layer_of(network: Network) -> int:
    """The layer to begin with: that of the authors, or what corresponds to it.

    A UNet begins with the two finest decoder levels that have attention. For transformers there is no authors' choice.
    They begin in the middle: as in the UNet the first half settles where things are, which is the edit's business, and
    the second what they look like.
    """
    joint = joint_blocks(network)
    return len(joint) // 2 if joint else default_first_layer(_unet_blocks(network))


def _unet_blocks(network: Network) -> list[str]:
    """The block of every transformer block of a UNet, in the order they run."""
    return [layer.block for layer in attention_layers(network) if layer.patch == "attn1"]


class _ReferencePatch:
    """Installs the control for the time of a sampler's run; keeps no state, so runs side by side never meet."""

    key = "retrace_reference_kv"

    def __init__(self, first_layer: int, start_percent: float, end_percent: float) -> None:
        self.first_layer, self.start_percent, self.end_percent = first_layer, start_percent, end_percent

    def sample(self, executor: Executor, *args: object, **kwargs: object) -> Tensor:
        """Around a whole run of a sampler."""
        call = SamplerCall(args, kwargs)
        images = call["noise"].shape[0]
        if images < 2:  # under core's sampler no node puts its own words to the error
            raise InvalidInput(
                f"Reference KV Control: the sampler works on a batch of {images}, but a batch [reference, edit, ...] "
                "is needed: the edits take keys and values from the first image. Connect the LATENT of 'Drag Latent "
                "Optimizer', or join the latents of the two images with 'Latent Batch', the reference first."
            )
        model = call["model_wrap"].inner_model
        # Only now: a later node may have shifted the noise levels, or patched the attention, which must be there to be
        # kept.
        start, end = (float(model.model_sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        control = ReferenceKV(self.first_layer, start=start, end=end)
        arguments = dict(call["extra_args"])
        options = arguments["model_options"] = dict(arguments.get("model_options", {}))
        if joint_blocks(model.diffusion_model):
            install_exchange(options, model.diffusion_model, partial(_exchange, control))
        else:
            install_attention(options, model.diffusion_model, control)
        call["extra_args"] = arguments
        samples: Tensor = call.run(executor)
        return samples


def _exchange(control: ReferenceKV, layer: int, sigma: float, rows: tuple[Row, ...]) -> Sequence[int] | None:
    return reference_rows(rows) if control.applies(layer, sigma) else None
