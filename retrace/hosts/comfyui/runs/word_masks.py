"""Masks of words between ComfyUI's sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidSetting
from ....core.host import AttentionDenoiser, Conditioning
from ....core.trajectory import Trajectory
from ....prompt_to_prompt.word_masks import word_maps, word_mask
from ..host import ComfyHost


@dataclass(frozen=True)
class FoundWords:
    """A MASK ``[B, H, W]`` of all words, and an image ``[B * K, H, W, 3]`` of the map of each."""

    words: tuple[str, ...]
    mask: Tensor
    images: Tensor

    def report(self) -> str:
        """The words in the order of their images, and the share of the image that each attends to on average."""
        shares = self.images[..., 0].flatten(1).mean(1).view(-1, len(self.words)).mean(0).tolist()
        lines = [f"{word}: mean {share:.2f}" for word, share in zip(self.words, shares, strict=True)]
        return "\n".join([*lines, f"mask: {float(self.mask.mean()):.0%} of the image"])


def find_words(
    host: ComfyHost, trajectory: Trajectory, prompt: str, words: Sequence[str], threshold: float, levels: int
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
