"""Other rules than classifier-free guidance, under core's samplers."""

from __future__ import annotations

from torch import Tensor

from ....prompt_to_prompt.proximal import Proximal
from ..types import Model, Options


def patch_proximal(model: Model, proximal: Proximal) -> Model:
    """A clone of the MODEL whose samplers guide with ``proximal``. It takes the place of another such rule."""

    def guide(args: Options) -> Tensor:
        # Core asks for what is to be taken off the latent. At cfg 1 nothing is guided, and it has no negative estimate.
        if args["cond_scale"] == 1:
            denoised: Tensor = args["cond_denoised"]
        else:
            denoised = proximal.guided(args["uncond_denoised"], args["cond_denoised"], args["cond_scale"])
        x: Tensor = args["input"]
        return x - denoised

    patched = model.clone()
    patched.set_model_sampler_cfg_function(guide)
    return patched
