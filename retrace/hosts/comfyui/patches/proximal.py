"""Other rules than classifier-free guidance, under core's samplers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....prompt_to_prompt.proximal import Proximal


def patch_proximal(model: Any, proximal: Proximal) -> Any:
    """A clone of the MODEL whose samplers guide with ``proximal``. It takes the place of another such rule."""

    def guide(args: dict[str, Any]) -> Tensor:
        # Core asks for what is to be taken off the latent. At cfg 1 nothing is guided, and it has no negative estimate.
        if args["cond_scale"] == 1:
            return args["input"] - args["cond_denoised"]  # type: ignore[no-any-return]
        return args["input"] - proximal.guided(args["uncond_denoised"], args["cond_denoised"], args["cond_scale"])  # type: ignore[no-any-return]

    patched = model.clone()
    patched.set_model_sampler_cfg_function(guide)
    return patched
