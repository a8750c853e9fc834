"""Stage 3: the contrastive image-text model: a new image tower learns to agree with the text tower of the UNet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.pebble import architecture
from ...models.pebble.clip import normalise, text_tower
from ...models.pebble.scenes import Scene
from ..stage import Stage
from .data import ScenePool

BATCH = 96


# Of the text side only the projection is trained.
LOCKED = ("token_embedding", "positional_embedding", "transformer", "ln_final")


def build(text_encoder: dict[str, Tensor]) -> nn.Module:
    """New weights, but for the text tower: ``text_encoder`` as it ships, locked (Zhai et al. 2022, LiT)."""
    import open_clip

    model: nn.Module = open_clip.CLIP(**architecture.CLIP)
    model.load_state_dict({k: v.float() for k, v in text_tower(text_encoder).items()}, strict=False)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(LOCKED))
    return model


def caption(scene: Scene, generator: torch.Generator) -> str:
    """Every object is named; ground and details are left out at times, so that short captions are understood too."""
    chance = torch.rand(2, generator=generator).tolist()
    return scene.caption(with_ground=chance[0] < 0.85, with_details=chance[1] < 0.8)


def train(
    folder: Path, seconds: float, pool: ScenePool, text_encoder: dict[str, Tensor], max_steps: int = 8_000
) -> Stage:
    """The symmetric InfoNCE loss of CLIP, with random shifts of the pictures."""
    import open_clip

    torch.manual_seed(2)
    run = Stage("clip", build(text_encoder), folder, seconds, max_steps, lr=1e-3, weight_decay=0.05, warmup=200)
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    def loss(generator: torch.Generator) -> Tensor:
        which = torch.randperm(len(pool.scenes), generator=generator)[:BATCH].tolist()
        images = normalise(pool.images[which].to(run.device).float() / 255)
        texts = tokenize([caption(pool.scenes[i], generator) for i in which]).to(run.device)
        image, text, scale = run.model(images, texts)
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        # Equal captions inside a batch are no mistakes: they share the target.
        same = (texts[:, None] == texts[None]).all(-1).float()
        target = same / same.sum(-1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    run.run(loss)
    return run
