"""ComfyUI's processed conditions behind the Conditioning protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import describe
from ...core.errors import InvalidInput, Remedy, UnsupportedModel
from .plain import alias
from .types import ConditioningList, Model, Options

# Core looks at the first row of a batch only to decide whether or how these act.
_TIMED = {"start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "hooks", "control"}
TEXT = "c_crossattn"  # where core keeps the token embeddings that cross-attention reads


def require_conditioning(name: str, value: object) -> ConditioningList:
    """The entries of a CONDITIONING; raises InvalidInput for anything else."""
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{name}: got {describe(value)}, but a CONDITIONING is needed.", Remedy.CONNECT_PROMPT)
    return value


def part_of_steps(options: Options) -> tuple[float, float] | None:
    """From where to where, 0 to 1, an entry of a CONDITIONING with these options holds; None for all steps."""
    start = max(options.get(key) or 0.0 for key in ("start_percent", "clip_start_percent"))
    end = min(options.get(key, 1.0) for key in ("end_percent", "clip_end_percent"))
    return (start, end) if start > 0 or end < 1 else None


def require_one_prompt(name: str, conditioning: object, why: str) -> None:
    """Raise InvalidInput unless a CONDITIONING is one prompt for the whole image at all noise levels.

    ``why`` completes the sentence "... must be one prompt, because ...".
    """
    entries = require_conditioning(name, conditioning)
    options = entries[0][1]
    part, found = part_of_steps(options), None
    if len(entries) > 1:
        found = f"{len(entries)} prompts"
    elif any(options.get(key) is not None for key in ("area", "mask")):
        found = "a prompt for a part of the image"
    elif part:
        found = f"a prompt for a part of the steps ({part[0]:g} to {part[1]:g})"
    if found:
        raise InvalidInput(
            f"{name}: this CONDITIONING holds {found}, but it must be one prompt for the whole image and all steps, "
            f"because {why}.",
            Remedy.CONNECT_PROMPT,
        )


def levels_may_mix(model: Model, *conditionings: ConditioningList) -> bool:
    """Whether latents of different noise levels may share a call: no time ranges, hooks, ControlNets or patches."""
    options = model.model_options
    patched = (
        any(options.get("transformer_options", {}).values())
        or "model_function_wrapper" in options
        or any(wrappers for kind in model.wrappers.values() for wrappers in kind.values())
    )
    return not patched and not any(_TIMED & entry[1].keys() for conds in conditionings for entry in conds)


class ComfyConditioning:
    """One condition as core prepared it: a list of entries with areas, masks, timestep ranges, control, hooks.

    Prompts joined in the graph (areas, Conditioning Combine, timestep ranges) give several entries, each with its own
    embedding. :attr:`embedding` is that of the first; :meth:`with_embedding` replaces it there and in every entry that
    holds the same one (core repeats a condition to cover the area of another), and leaves the rest as they are.
    """

    def __init__(self, entries: list[Options]) -> None:
        self.entries = entries

    @classmethod
    def prepared(cls, entries: list[Options], device: torch.device) -> ComfyConditioning:
        """From core's list, with the embeddings as ordinary tensors on ``device``."""
        moved: dict[int, Any] = {}
        ready = []
        for entry in entries:
            held = entry.get("model_conds", {}).get(TEXT)
            if held is not None and isinstance(getattr(held, "cond", None), Tensor):
                if id(held) not in moved:
                    moved[id(held)] = held._copy_with(alias(held.cond).to(device))
                entry = {**entry, "model_conds": {**entry["model_conds"], TEXT: moved[id(held)]}}
            ready.append(entry)
        return cls(ready)

    @property
    def embedding(self) -> Tensor:
        """Token embeddings ``[B, T, D]`` of the first entry."""
        return self._first().cond  # type: ignore[no-any-return]

    def with_embedding(self, embedding: Tensor) -> ComfyConditioning:
        """The same condition with other token embeddings ``[B, T, D]``; gradients flow to them."""
        old = self._first()
        new = old._copy_with(embedding)
        entries = []
        for entry in self.entries:
            held = entry.get("model_conds", {}).get(TEXT)
            if held is old or (held is not None and _equal(held.cond, old.cond)):
                entry = {**entry, "model_conds": {**entry["model_conds"], TEXT: new}}
            entries.append(entry)
        return ComfyConditioning(entries)

    def _first(self) -> Any:
        for entry in self.entries:
            held = entry.get("model_conds", {}).get(TEXT)
            if held is not None:
                return held
        raise UnsupportedModel(
            "This model takes no text embeddings through cross-attention (its condition holds "
            f"{sorted(self.entries[0].get('model_conds', {})) if self.entries else 'nothing'}). "
            "Methods that change the text embedding need a model of the SD1.5 or SDXL kind."
        )


def _equal(a: object, b: object) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.device == b.device
        and bool(torch.equal(a, b))
    )
