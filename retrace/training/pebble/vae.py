"""Stage 1: the KL autoencoder, on random crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.pebble import architecture
from ...models.pebble.scenes import SIZE
from ..stage import Stage, best_device
from .data import ScenePool

KL_WEIGHT = 1e-4
CROP, BATCH = 64, 16
# The last part sees whole pictures: group norms and the attention in the middle depend on the picture's size.
WHOLE_FROM = 0.85


def build() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**architecture.VAE)


def load(folder: Path) -> Any:
    """The autoencoder as it ships in ``folder``."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae").float().to(best_device()).eval().requires_grad_(False)


def stage(folder: Path, seconds: float, max_steps: int = 40_000) -> Stage:
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        # Begin nearly deterministic: at the default unit variance the decoder learns to ignore the latent.
        model.quant_conv.weight[architecture.LATENT_CHANNELS :].zero_()
        model.quant_conv.bias[architecture.LATENT_CHANNELS :].fill_(-6.0)
    return Stage("vae", model, folder, seconds, max_steps, lr=1e-3)


def train(folder: Path, seconds: float, pool: ScenePool) -> Stage:
    """L1 + MSE reconstruction with a small KL term; crops of 64 pixels show every texture and edge cheaply."""
    run = stage(folder, seconds)

    def loss(generator: torch.Generator) -> Tensor:
        whole = run.progress > WHOLE_FROM
        size, batch = (SIZE, BATCH * CROP**2 // SIZE**2) if whole else (CROP, BATCH)
        x = pool.crops(batch, size, generator).to(run.device)
        posterior = run.model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = run.model.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        total: Tensor = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + KL_WEIGHT * kl
        return total

    run.run(loss)
    return run
