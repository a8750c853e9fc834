"""Where in an image the model sees a word: cross-attention maps along its inversion (Hertz et al. 2023, figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import check_steps
from ..core.errors import InvalidSetting
from ..core.host import AttentionCall, AttentionDenoiser, Conditioning, Host
from ..core.trajectory import Trajectory
from .control import attention_maps
from .local_blend import LocalBlend, WordMaps


def word_maps(
    model: AttentionDenoiser,
    trajectory: Trajectory,
    cond: Conditioning,
    places: Sequence[tuple[int, ...]],
    levels: int = 10,
) -> Tensor:
    """Maps ``[B, K, h, w]`` of K words for the B images of ``trajectory``, on the grid of the latent, 0..1.

    ``places[k]`` says where word k stands in the embedding of ``cond``. The model looks at the inverted latents of
    ``levels`` of the steps, evenly spread: that many evaluations per image. Each map is relative to its own maximum.

    Raises:
        InvalidSchedule: ``levels`` below 1.
    """
    check_steps("levels", levels, 1)
    images, count = trajectory.latents.shape[1], len(places)
    maps = WordMaps(LocalBlend(tuple(places) * images))

    def record(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call.kind == "cross":
            maps.add(call, attention_maps(q, k).repeat_interleave(count, dim=0))
        return call.attend(q, k, v)

    steps = [i for i in range(trajectory.steps) if float(trajectory.sigmas[i]) > 0]
    chosen = sorted({steps[int((n + 0.5) * len(steps) / levels)] for n in range(levels)})
    with torch.no_grad(), model.attention(record):
        for done, i in enumerate(chosen, 1):
            x = trajectory.latents[i].to(model.device, torch.float32)
            denoised = model.denoised(x, float(trajectory.sigmas[i]), cond)
            model.progress(done, len(chosen), denoised)
    height, width = trajectory.latents.shape[-2:]
    found = maps.mean(height, width)[0][:, None]
    # Smooth in between, so that a threshold cuts along a line and not along the cells.
    found = F.interpolate(found, size=(height, width), mode="bilinear", align_corners=False)
    found = found / found.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return found.view(images, count, height, width)


def word_mask(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """One mask ``[B, H, W]`` of ``size`` for all words of ``maps`` ``[B, K, h, w]``.

    1 where any of them exceeds ``threshold``; with threshold 0 the maps themselves, 0..1.
    """
    large = F.interpolate(maps, size=size, mode="bicubic", align_corners=False).clamp(0, 1).amax(1)
    return (large > threshold).float() if threshold > 0 else large


@dataclass(frozen=True)
class FoundWords:
    """A mask ``[B, H, W]`` of all words, and an image ``[B * K, H, W, 3]`` of the map of each."""

    words: tuple[str, ...]
    mask: Tensor
    images: Tensor

    def text(self) -> str:
        """The words in the order of their images, and the share of the image that each attends to on average."""
        shares = self.images[..., 0].flatten(1).mean(1).view(-1, len(self.words)).mean(0).tolist()
        lines = [f"{word}: mean {share:.2f}" for word, share in zip(self.words, shares, strict=True)]
        return "\n".join([*lines, f"mask: {float(self.mask.mean()):.0%} of the image"])


def find_words(
    host: Host, trajectory: Trajectory, prompt: str, words: Sequence[str], threshold: float, levels: int
) -> FoundWords:
    """Look for ``words`` of ``prompt`` (all of them if there are none) in an inverted image.

    Raises:
        TrajectoryMismatch: a trajectory of another kind of model.
        RetraceError: a word that is not in the prompt (lists its words), or an empty prompt.
        UnsupportedModel: no UNet with cross-attention, or a text encoder that is not CLIP's.
    """
    trajectory.require_kind(host.parametrisation, host.latent_format)
    (read,) = host.read_prompts([prompt])
    chosen = tuple(words) or tuple(dict.fromkeys(word.text for word in read.words))
    if not chosen:
        raise InvalidSetting("The prompt is empty, so there is no word to look for. Write what the image shows.")
    places = [read.find(word) for word in chosen]

    def method(model: AttentionDenoiser, _: Tensor, conds: Mapping[str, Conditioning]) -> Tensor:
        return word_maps(model, trajectory, conds["positive"], places, levels)

    maps = host.run(trajectory.source, {"positive": host.encode_text(prompt)}, method)
    height, width = (side * host.downscale for side in maps.shape[-2:])
    images = F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    images = images.flatten(0, 1)[..., None].repeat(1, 1, 1, 3)
    return FoundWords(chosen, word_mask(maps, (height, width), threshold), images)
