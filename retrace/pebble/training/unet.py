"""Stage 3: the UNet, on cached latents, with captions dropped so that guidance and the null text work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import architecture
from .data import ScenePool, training_caption
from .stage import Stage, fast_precision
from .text_tower import END, START

BATCH = 32
EMPTY_CAPTIONS = 0.12
log = logging.getLogger("retrace.pebble")


def build() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**architecture.UNET)


def alphas_cumprod() -> Tensor:
    """SD1.5's "scaled linear" schedule, ``[1000]``."""
    s = architecture.SCHEDULER
    betas = torch.linspace(s["beta_start"] ** 0.5, s["beta_end"] ** 0.5, s["num_train_timesteps"]) ** 2
    return torch.cumprod(1 - betas, 0)


def loss_weights(signal: Tensor) -> Tensor:
    """Weight of every timestep ``[1000]`` for ``signal`` = alphas_cumprod, mean 1.

    The plain noise loss hardly notices layout, shape and ground, which are decided where there is little signal: words
    for the ground matter only at the highest tenth of the levels. Weighted by 1 / signal (up to 50) it is the loss of
    v-prediction (Salimans & Ho 2022), which does notice.
    """
    weights = (1 / signal).clamp(max=50)
    return weights / weights.mean()


@torch.inference_mode()
def cache_latents(vae: Any, pool: ScenePool, file: Path) -> Tensor:
    """Posterior means of all scenes, ``[N, 4, 16, 16]``, not yet scaled; kept in ``file`` for a run that resumes."""
    if file.exists():
        return cast(Tensor, torch.load(file, weights_only=True))
    latents = []
    for start in range(0, len(pool.images), 64):
        images = pool.images[start : start + 64].to(vae.device).float() / 127.5 - 1
        with fast_precision(images.device):
            latents.append(vae.encode(images).latent_dist.mean.float().cpu())
    result = torch.cat(latents)
    torch.save(result, file)
    return result


class Captions:
    """Encodes captions with the frozen text tower, each only once."""

    def __init__(self, text_encoder: Any) -> None:
        import open_clip

        self.text_encoder = text_encoder
        self.tokenize = open_clip.get_tokenizer("ViT-B-32")
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> Tensor:
        new = sorted(set(captions) - self.known.keys())
        if new:
            ids = self.tokenize(new)
            # SD1.x pads with the end token; open_clip pads with zeros.
            ids = torch.where(ids == 0, END, ids)
            ids[:, 0] = START
            hidden = self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state.float()
            self.known.update(zip(new, hidden, strict=True))
        return torch.stack([self.known[c] for c in captions]).clone()


def train(
    folder: Path, seconds: float, pool: ScenePool, latents: Tensor, text_encoder: Any, max_steps: int = 20_000
) -> Stage:
    """Noise prediction (Ho et al. 2020, eq. 14, weighted) on ``latents`` ``[N, 4, 16, 16]`` of unit variance."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(3)
    model = build()
    # Plain matrix products: on CPUs a good deal faster to train than the fused attention, and the same on GPUs.
    model.set_attn_processor(AttnProcessor())
    run = Stage("unet", model, folder, seconds, max_steps, lr=1e-3, ema_decay=0.9985)
    captions = Captions(text_encoder)
    signal = alphas_cumprod()
    weights = loss_weights(signal)

    def loss(generator: torch.Generator) -> Tensor:
        which = torch.randint(len(latents), (BATCH,), generator=generator)
        x0 = latents[which]
        t = torch.randint(len(signal), (BATCH,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = signal[t][:, None, None, None]
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        context = captions([training_caption(pool.scenes[i], generator, EMPTY_CAPTIONS) for i in which.tolist()])
        eps = run.model(x.to(run.device), t.to(run.device), context.to(run.device)).sample
        errors = F.mse_loss(eps.float(), noise.to(run.device), reduction="none").mean(dim=(1, 2, 3))
        return (errors * weights[t].to(run.device)).mean()

    run.run(loss)
    return run
