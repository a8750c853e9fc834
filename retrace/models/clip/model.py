"""Image-text models (CLIP, Radford et al. 2021) through open_clip, with weights that are already there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.checks import describe
from ...core.errors import InvalidImage, UnsupportedModel, require
from ...core.images import resize
from ..pebble.clip import MEAN, STD, load_clip
from .files import SUFFIXES, ClipNetwork, Facts, fill, find_weights, read_weights

PEBBLE = "Pebble's CLIP"
"""Name of the CLIP that ships with the pack; it knows Pebble's world only."""

KNOWN = (
    "ViT-B-32/openai",
    "ViT-B-16/openai",
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
    "ViT-B-32/laion2b_s34b_b79k",
    "ViT-H-14/laion2b_s32b_b79k",
)
"""Pretrained models to offer, in open_clip's names: architecture/tag."""

ARCHITECTURES = (
    "ViT-B-32-quickgelu",
    "ViT-B-16-quickgelu",
    "ViT-L-14-quickgelu",
    "ViT-L-14-336-quickgelu",
    "ViT-H-14-quickgelu",
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
)
"""Architectures to offer for a file of one's own. The activation is not in the file: quickgelu for weights of OpenAI,
DFN and MetaCLIP, plain for those of LAION and DataComp."""

Tokenize: TypeAlias = Callable[[list[str]], Tensor]
"""Texts to ids ``[N, L]``."""

_TAGGED = re.compile(r"([\w.-]+)/([\w.-]+)")


class ImageTextModel:
    """A contrastive image-text model with its preprocessing: what travels on the socket RETRACE_CLIP.

    Args:
        model: an open_clip model in evaluation mode, without gradients for its weights.
        tokenize: texts to ids ``[N, L]``.
        name: for messages.
        mean, std: of the three channels, as the model was trained with.
    """

    def __init__(
        self,
        model: ClipNetwork,
        tokenize: Tokenize,
        name: str,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.model, self.tokenize, self.name = model, tokenize, name
        self.mean, self.std = tuple(mean), tuple(std)
        size = model.visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        """native (height, width) in pixels"""

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where everything is computed."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def to(self, device: torch.device | str) -> ImageTextModel:
        """Move the weights; returns itself."""
        with torch.inference_mode(False):  # else they become inference tensors, through which no gradient goes
            self.model.to(device)
        return self

    @contextlib.contextmanager
    def on(self, device: torch.device | str) -> Iterator[ImageTextModel]:
        """Work on ``device``, and take the weights back to where they were."""
        home = self.device
        try:
            yield self.to(device)
        finally:
            self.to(home)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``[B, H, W, 3]`` in 0..1 of any size to what the model sees ``[B, 3, h, w]``, on its device.

        The whole image is squeezed to the native size (bicubic, antialiased), where open_clip cuts out the middle
        square: no edit is lost at a border, and square images are the same. What overshoots 0..1 is clamped.

        Raises:
            InvalidImage: not ``[B, H, W, 3]``.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise InvalidImage(f"image: got {describe(images)}, but an image batch [B, H, W, 3] is needed.")
        pixels = resize(images.to(self.device, torch.float32), self.size).movedim(-1, 1)
        return self._normalised(pixels.clamp(0, 1))

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``[B, D]``, float32, of images ``[B, H, W, 3]`` in 0..1. Gradients reach the images.

        Raises:
            InvalidImage: not ``[B, H, W, 3]``.
        """
        return F.normalize(self.model.encode_image(self.preprocess(images)).float(), dim=-1)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``[B, D]``, float32, of ``[B, 3, h, w]`` around 0..1 of the native size.

        Gradients also come from beyond 0..1.
        """
        return F.normalize(self.model.encode_image(self._normalised(pixels.to(self.device))).float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[N, D]``, float32, of any texts; what is beyond the model's 77 tokens is cut off."""
        ids = self.tokenize([text.encode("utf-8", "replace").decode("utf-8") for text in texts])
        return F.normalize(self.model.encode_text(ids.to(self.device)).float(), dim=-1)

    @property
    def has_tokens(self) -> bool:
        """Whether :meth:`visual_tokens` works: the image side is open_clip's vision transformer."""
        return len(self._blocks()) > 1

    def _blocks(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = getattr(getattr(self.model.visual, "transformer", None), "resblocks", ())
        return blocks

    def visual_tokens(self, images: Tensor) -> Tensor:
        """Spatial tokens ``[B, N, C]`` after the last block but one, row by row, without the class token.

        Raises:
            InvalidImage: not ``[B, H, W, 3]``.
            UnsupportedModel: the image side is no vision transformer of open_clip.
        """
        if not self.has_tokens:
            raise UnsupportedModel(
                f"'{self.name}' gives no tokens of an image: its image side is {type(self.model.visual).__name__}, "
                "but a vision transformer (ViT) is needed. Load one, or take a CLIP Vision model."
            )
        kept: list[Tensor] = []
        hook = self._blocks()[-2].register_forward_hook(lambda module, arguments, output: kept.append(output))
        try:
            self.model.encode_image(self.preprocess(images))
        finally:
            hook.remove()
        # Old versions of open_clip run their blocks on ``[N, B, C]``.
        batch_first = getattr(self.model.visual.transformer, "batch_first", False)
        tokens = kept[0] if batch_first else kept[0].transpose(0, 1)
        return tokens[:, 1:]


def load_image_text_model(
    name_or_file: str | os.PathLike[str] = PEBBLE,
    device: torch.device | str = "cpu",
    architecture: str = ARCHITECTURES[0],
    folders: Sequence[str | os.PathLike[str]] = (),
) -> ImageTextModel:
    """Build an image-text model in fp32 from weights on disk; nothing is ever downloaded.

    Args:
        name_or_file: :data:`PEBBLE`; a pretrained model of open_clip as ``architecture/tag``, for example one of
            :data:`KNOWN`; or a file with open_clip's weights.
        device: where it computes.
        architecture: open_clip's name for what a file holds; pretrained models bring their own.
        folders: where a pretrained model's file is looked for, before Hugging Face's cache.

    Raises:
        MissingPackage: open_clip is not installed.
        InvalidFile: the weights are missing, unreadable or not of this architecture.
        UnsupportedModel: open_clip does not know the architecture or the tag, or it needs more than one file.
    """
    # Built outside of inference mode, so that gradients can go through, and without a trace in the global random state.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        if str(name_or_file) == PEBBLE:
            return ImageTextModel(*load_clip(), PEBBLE).to(device)
        open_clip = require("open_clip", "load an image-text model", "open_clip_torch")
        tagged = _TAGGED.fullmatch(name_or_file) if isinstance(name_or_file, str) else None
        facts: Facts = {}
        file = Path(name_or_file)
        if tagged and file.suffix not in SUFFIXES:
            architecture, tag = tagged.groups()
            facts = _pretrained(open_clip, architecture, tag)
            file = find_weights(architecture, tag, facts, folders)
        config = _config(open_clip, architecture)
        config["quick_gelu"] = config.get("quick_gelu", False) or facts.get("quick_gelu", False)
        stored = read_weights(file)
        model = open_clip.CLIP(**config)
        fill(model, stored, file, architecture)
        tokenize = open_clip.get_tokenizer(architecture)
        name = str(name_or_file) if facts else file.name
        clip = ImageTextModel(
            model.eval().requires_grad_(False), tokenize, name, facts.get("mean", MEAN), facts.get("std", STD)
        )
        return clip.to(device)


def _pretrained(open_clip: ModuleType, architecture: str, tag: str) -> Facts:
    facts: Facts = open_clip.get_pretrained_cfg(architecture, tag)
    if not facts:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none for this architecture"
        raise UnsupportedModel(
            f"open_clip has no pretrained model '{architecture}/{tag}'. Its tags: {tags}. Choose one, or name a file."
        )
    return facts


def _config(open_clip: ModuleType, architecture: str) -> Facts:
    """The configuration of a model that is one file: a plain CLIP with open_clip's own tokenizer."""
    config: Facts | None = open_clip.get_model_config(architecture) if "/" not in architecture else None
    if config is None:
        raise UnsupportedModel(
            f"open_clip has no architecture '{architecture}'. Choose another one, for example {ARCHITECTURES[0]}, or "
            "update the package: pip install -U open_clip_torch"
        )
    hub = {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"])
    if hub or config.get("custom_text") or "multimodal_cfg" in config:
        raise UnsupportedModel(
            f"The architecture '{architecture}' is not a plain CLIP (its text side is built or tokenised by other "
            f"files, which would be downloaded). Choose another one, for example {ARCHITECTURES[0]}."
        )
    return config
