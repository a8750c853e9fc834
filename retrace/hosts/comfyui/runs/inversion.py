"""Inversion between LATENT sockets."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ....core.host import Conditioning, Denoiser, Origin
from ....core.sampling import sample_ddim
from ....core.trajectory import Trajectory
from ....inversion.invert import InversionSettings, Inverted, invert, latent_psnr
from ....metrics import psnr
from ..host import ComfyHost
from ..latents import below_flow_top, clean_latent
from ..types import ConditioningList


def invert_latent(
    host: ComfyHost,
    samples: Tensor,
    sigmas: Tensor,
    positive: ConditioningList,
    settings: InversionSettings,
    verify: bool = True,
) -> Inverted:
    """Invert the ``samples`` of a LATENT under the CONDITIONING ``positive``; see :func:`.invert.invert`.

    ``verify`` samples back once; the score of the image needs a host with a VAE. Flow models whose walk would end at
    sigma 1 end at :data:`~..latents.FLOW_TOP` instead.
    """
    sigmas = below_flow_top(host.parametrisation, sigmas)
    origin = Origin.of(host)

    def there_and_back(
        denoiser: Denoiser, latent: Tensor, conds: Mapping[str, Conditioning]
    ) -> tuple[Trajectory, Tensor | None]:
        trajectory = invert(denoiser, latent, sigmas, conds["positive"], settings, origin)
        if not verify:
            return trajectory, None
        return trajectory, sample_ddim(denoiser, trajectory.noise, sigmas, conds["positive"])

    x0 = clean_latent(host, samples, sigmas)
    trajectory, back = host.run(x0, {"positive": positive}, there_and_back, gradients=settings.needs_gradients)
    if back is None:
        return Inverted(trajectory)
    image_psnr: float | None = None
    if host.vae is not None:
        image_psnr = float(psnr(host.decode_latent(back), host.decode_latent(trajectory.source)).mean())
    return Inverted(trajectory, latent_psnr(back, trajectory.source), image_psnr)
