"""Stage 2: the UNet and the text tower together, on cached latents; dropped captions teach the null text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.pebble import architecture
from ..stage import Stage, fast_precision
from . import text_tower
from .data import ScenePool, training_caption
from .text_tower import END

BATCH = 64
EMPTY_CAPTIONS = 0.12
SPREAD = 1.3  # standard deviation of log sigma
UNIFORM = 0.15
REFINE = 100_000  # seed of its data
log = logging.getLogger("retrace.training.pebble")


def build() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**architecture.UNET)


def alphas_cumprod() -> Tensor:
    """SD1.5's "scaled linear" schedule, ``[1000]``."""
    s = architecture.SCHEDULER
    betas = torch.linspace(s["beta_start"] ** 0.5, s["beta_end"] ** 0.5, s["num_train_timesteps"]) ** 2
    return torch.cumprod(1 - betas, 0)


def draw_timesteps(count: int, log_sigmas: Tensor, generator: torch.Generator) -> Tensor:
    """Timesteps ``[count]``, most of them where layout and outlines are decided: a normal distribution of log sigma
    (Karras et al. 2022, table 1) around sigma 1, that of the latents; the rest uniform, so that no level is left out.
    """
    normal = torch.randn(count, generator=generator) * SPREAD
    middle = torch.searchsorted(log_sigmas, normal).clamp(max=len(log_sigmas) - 1)
    anywhere = torch.randint(len(log_sigmas), (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < UNIFORM, anywhere, middle)


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
    """Captions as token ids ``[B, 77]``, padded with the end token as SD1.x does (open_clip pads with zeros)."""

    def __init__(self) -> None:
        import open_clip

        self.tokenize = open_clip.get_tokenizer("ViT-B-32")

    def __call__(self, captions: list[str]) -> Tensor:
        ids = self.tokenize(captions)
        return torch.where(ids == 0, END, ids)


def is_hidden(name: str, weight: Tensor) -> bool:
    """Whether Muon trains this weight: matrices and kernels, but neither embeddings nor the first and last layer."""
    return weight.ndim >= 2 and not any(part in name for part in ("embedding", "conv_in", "conv_out"))


def train(folder: Path, seconds: float, pool: ScenePool, latents: Tensor, max_steps: int = 20_000) -> Stage:
    """v-prediction (Salimans & Ho 2022) on ``latents`` ``[N, 4, 16, 16]`` of unit variance.

    The text tower learns along: what the UNet needs from the words is not what tells pictures apart, and a tower
    trained for that alone keeps the shapes too close to each other.
    """
    torch.manual_seed(3)
    networks = nn.ModuleDict({"unet": build(), "text": text_tower.build()})
    run = Stage("unet", networks, folder, seconds, max_steps, lr=1e-3, ema_decay=0.9985, muon=is_hidden)
    run.run(velocity_loss(run, pool, latents, torch.ones(len(latents))))
    return run


def refine(
    folder: Path, seconds: float, pool: ScenePool, latents: Tensor, shipped: dict[str, Any], max_steps: int = 2_500
) -> Stage:
    """A second cosine for the UNet alone, from ``shipped`` (states of ``unet`` and ``text``), at a lower rate.

    The text tower stays as it is, so that the CLIP that was trained against it stays valid. Scenes with a star come
    twice as often: their outline is the longest, and the last that a UNet learns.
    """
    networks = nn.ModuleDict({"unet": build(), "text": text_tower.build()})
    for name, state in shipped.items():
        networks[name].load_state_dict(state)
    networks["text"].requires_grad_(False)
    muon: dict[str, Any] = {"muon": is_hidden, "muon_lr": 1.2e-3}
    run = Stage("refine", networks, folder, seconds, max_steps, lr=6e-4, ema_decay=0.998, seed=REFINE, **muon)
    stars = [any(o.shape == "star" for o in scene.objects) for scene in pool.scenes]
    run.run(velocity_loss(run, pool, latents, 1.0 + torch.tensor(stars).float()))
    return run


def velocity_loss(run: Stage, pool: ScenePool, latents: Tensor, chances: Tensor) -> Callable[[torch.Generator], Tensor]:
    """The loss of one batch; scene i is drawn in proportion to ``chances[i]``."""
    from diffusers.models.attention_processor import AttnProcessor

    unet, text = run.model["unet"], run.model["text"]
    # Plain matrix products: on CPUs a good deal faster to train than the fused attention, and the same on GPUs.
    unet.set_attn_processor(AttnProcessor())
    captions = Captions()
    signal = alphas_cumprod()
    log_sigmas = ((1 - signal) / signal).sqrt().log()

    def loss(generator: torch.Generator) -> Tensor:
        which = torch.multinomial(chances, BATCH, replacement=True, generator=generator)
        x0 = latents[which]
        t = draw_timesteps(BATCH, log_sigmas, generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = signal[t][:, None, None, None]
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        v = a.sqrt() * noise - (1 - a).sqrt() * x0
        ids = captions([training_caption(pool.scenes[i], generator, EMPTY_CAPTIONS) for i in which.tolist()])
        context = text(ids.to(run.device)).last_hidden_state
        predicted = unet(x.to(run.device), t.to(run.device), context).sample
        return F.mse_loss(predicted.float(), v.to(run.device))

    return loss
