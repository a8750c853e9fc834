"""Training data: a pool of rendered scenes, held in memory as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.pebble.scenes import Scene, render_batch, sample_scene, scene_rng


class ScenePool:
    """``count`` training scenes from index ``start`` on, rendered once."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.scenes: list[Scene] = [sample_scene(scene_rng("train", start + i)) for i in range(count)]
        chunks = (self.scenes[i : i + 256] for i in range(0, count, 256))
        self.images = torch.cat([(render_batch(c) * 255).round().to(torch.uint8) for c in chunks])

    def crops(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """Random crops ``[batch, 3, size, size]`` in -1..1."""
        which = torch.randint(len(self.scenes), (batch,), generator=generator)
        limit = self.images.shape[-1] - size + 1
        corner = torch.randint(limit, (batch, 2), generator=generator)
        picks = [
            self.images[i, :, y : y + size, x : x + size]
            for i, (y, x) in zip(which.tolist(), corner.tolist(), strict=True)
        ]
        return torch.stack(picks).float() / 127.5 - 1


def training_caption(scene: Scene, generator: torch.Generator, empty: float) -> str:
    """A caption that leaves things out at random, as people do; ``empty`` is the chance of no words at all."""
    chance = torch.rand(3, generator=generator).tolist()
    if chance[0] < empty:
        return ""
    return scene.caption(with_ground=chance[1] < 0.65, with_details=chance[2] < 0.6)
