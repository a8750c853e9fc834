"""Prompt-to-Prompt: the attention maps of a source prompt hold the layout of what other prompts change.

Hertz et al. 2023, "Prompt-to-Prompt Image Editing with Cross Attention Control" (arXiv 2208.01626), section 3. The
source and its targets are images of one batch, the source first. While they are denoised together, the targets take
over cross-attention maps of the source (through a :class:`TokenMap`) and its
self-attention maps, each during a window of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import InvalidInput, InvalidSetting, RetraceError
from ..core.host import AttentionCall
from ..core.prompt import Prompt
from .alignment import Aligner, Mode, TokenMap, token_map
from .local_blend import LocalBlend, WordMaps

Window = tuple[float, float]
"""Shares of the steps, from and to: (0, 0.8) are the first 80 % of them."""


@dataclass(frozen=True)
class Target:
    """One edit of the source prompt.

    ``windows`` ``[T, 2]`` are the shares of the steps during which the map of a token is edited: taken from the source,
    and multiplied by its ``weights`` ``[T]`` (attention re-weighting, eq. 5; negative numbers push a word out).
    """

    prompt: Prompt
    tokens: TokenMap
    windows: Tensor
    weights: Tensor

    def factors(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """What the map of each token is made of at ``step`` of ``steps``: how much of the source's mapped one, and how
        much of its own, both ``[T]``."""
        # The reference's table has steps + 1 rows, one more than a DDIM sampler asks for.
        first, last = (self.windows * (steps + 1)).int().unbind(-1)
        edited = ((step >= first) & (step < last)).float()
        taken = self.tokens.taken
        return taken * self.weights * edited, (1 - taken) * self.weights * edited + (1 - edited)


@dataclass(frozen=True)
class PromptToPrompt:
    """What to do with the attention of a batch ``[source, target, target ...]``; :meth:`start` begins a run.

    ``self_replace`` is the window of the self-attention maps, in layers of at most ``self_limit`` x ``self_limit``
    queries. ``blend`` keeps everything but what the given words attend to.
    """

    source: Prompt
    targets: tuple[Target, ...]
    self_replace: Window = (0.0, 0.4)
    self_limit: int = 32
    blend: LocalBlend | None = None

    @property
    def prompts(self) -> int:
        return 1 + len(self.targets)

    def start(self, steps: int) -> Controller:
        """The state of one sampling run of ``steps`` steps."""
        return Controller(self, steps)


@dataclass(frozen=True)
class PlanSettings:
    """How the targets follow the source.

    Attributes:
        mode: ``replace`` or ``refine``, see :func:`~.alignment.token_map`.
        cross_replace: the window of the cross-attention maps.
        self_replace: the window of the self-attention maps.
        self_limit: self-attention is replaced in layers of at most this many queries a side.
        word_windows: windows of their own for words of the targets, instead of ``cross_replace``.
        weights: how much words of the targets count (attention re-weighting).
        align: pairs the words of a source and a target.

    Raises:
        InvalidSetting: a window outside 0..1, or a weight that is not a number.
    """

    mode: Mode = "replace"
    cross_replace: Window = (0.0, 0.8)
    self_replace: Window = (0.0, 0.4)
    self_limit: int = 32
    word_windows: Mapping[str, Window] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    align: Aligner = token_map

    def __post_init__(self) -> None:
        for window in (self.cross_replace, self.self_replace, *self.word_windows.values()):
            if not 0 <= window[0] <= window[1] <= 1:
                raise InvalidSetting(
                    f"A window reaches from {window[0]:g} to {window[1]:g}; it needs two shares of the steps in order, "
                    "between 0 and 1."
                )
        for phrase, factor in self.weights.items():
            if not math.isfinite(factor):
                raise InvalidSetting(f"The weight of '{phrase}' is {factor}; it needs a finite number.")


def plan(
    source: Prompt, targets: Sequence[Prompt], settings: PlanSettings | None = None, blend: LocalBlend | None = None
) -> PromptToPrompt:
    """Settle an edit from words.

    A word of ``weights`` or ``word_windows`` must be in at least one target; it counts in each that has it. Windows are
    shares of the steps. Embeddings of all prompts must be equally long.

    Raises:
        RetraceError: a word that no target has (lists their words), no target, or what the aligner refuses.
    """
    settings = settings or PlanSettings()
    if not targets:
        raise RetraceError("Prompt-to-Prompt needs at least one target prompt beside the source.")
    for phrase in {**settings.word_windows, **settings.weights}:
        if not any(target.has(phrase) for target in targets):
            targets[0].find(phrase)  # raises, and lists the words
    made = tuple(_target(source, target, settings) for target in targets)
    return PromptToPrompt(source, made, settings.self_replace, settings.self_limit, blend)


def _target(source: Prompt, prompt: Prompt, settings: PlanSettings) -> Target:
    windows = torch.tensor(settings.cross_replace).repeat(prompt.length, 1)
    for phrase, window in settings.word_windows.items():
        if prompt.has(phrase):
            windows[list(prompt.find(phrase))] = torch.tensor(window)
    factors = torch.ones(prompt.length)
    for phrase, factor in settings.weights.items():
        if prompt.has(phrase):
            factors[list(prompt.find(phrase))] = factor
    return Target(prompt, settings.align(source, prompt, settings.mode), windows, factors)


def attention_maps(q: Tensor, k: Tensor) -> Tensor:
    """Maps ``[..., N, T]`` in float32 of queries ``[..., N, dim]`` and keys ``[..., T, dim]``.

    The products of SD2.x do not fit into fp16.
    """
    scale: float = q.shape[-1] ** -0.5
    return ((q.float() * scale) @ k.float().transpose(-1, -2)).softmax(-1)


@dataclass
class Controller:
    """An :class:`AttentionHook` for one run of ``steps`` steps; :meth:`enter` a step before the network runs.

    Rows of conditions other than the edited ones (:attr:`Row.cond`) pass untouched.
    """

    edit: PromptToPrompt
    steps: int
    maps: WordMaps | None = field(init=False)

    def __post_init__(self) -> None:
        self.maps = WordMaps(self.edit.blend) if self.edit.blend is not None else None
        self._step = 0
        self._positive: Collection[int] = (0,)
        self._table: list[tuple[Tensor, Tensor, Tensor]] = []
        self._table_of: tuple[int, torch.device] | None = None

    def enter(self, step: int) -> None:
        """Step number ``step``, 0-based, is the one that runs."""
        self._step = step

    def edits(self, positive: Collection[int]) -> None:
        """The numbers of the conditions whose rows are edited; without this call it is the first one."""
        self._positive = positive

    def blend(self, x: Tensor, done: int) -> Tensor:
        """The batch ``[P, C, h, w]`` when ``done`` steps are done, after local blend where there is one."""
        return x if self.maps is None or not done else self.maps.blend_latents(x, done, self.steps)

    def __call__(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self._groups(call)
        if not groups:
            return call.attend(q, k, v)
        if call.kind == "self":
            if not self._self_is_replaced(q.shape[2]):
                return call.attend(q, k, v)
            # A map is made of queries and keys: with those of the source a target has the map of the source.
            order = list(range(len(q)))
            for rows in groups:
                for row in rows[1:]:
                    order[row] = rows[0]
            return call.attend(q[order], k[order], v)
        out = call.attend(q, k, v)
        k, v = self._once(k, groups[0]), v[:, :, : self.edit.source.length]
        if self.maps is None and not self._cross_is_edited():
            return out
        out = out.clone()
        for rows in groups:
            own = attention_maps(q[rows], k[rows])
            edited = self._edit_maps(own)
            # As a difference, so that what other patches add to this layer (IP-Adapter ...) stays.
            out[rows[1:]] += ((edited[1:] - own[1:]).to(v.dtype) @ v[rows[1:]]).to(out.dtype)
            if self.maps is not None:
                self.maps.add(call, edited)
        return out

    def _groups(self, call: AttentionCall) -> list[list[int]]:
        """Numbers of the batch rows to edit, source first; one list for each entry of the condition."""
        rows = [n for n, row in enumerate(call.rows) if row.cond in self._positive]
        count = self.edit.prompts
        images = [call.rows[n].image for n in rows]
        if len(rows) % count or images != list(range(count)) * (len(rows) // count):
            raise InvalidInput(
                f"Prompt-to-Prompt has {count} prompts (the source first), but the sampler works on a batch of "
                f"{max(images, default=-1) + 1}. Give it one latent for each prompt."
            )
        return [rows[n : n + count] for n in range(0, len(rows), count)]

    def _once(self, k: Tensor, rows: list[int]) -> Tensor:
        """Keys with every token once: ComfyUI repeats the tokens of a prompt that shares a batch with a longer one."""
        length = self.edit.source.length
        if k.shape[2] == length:
            return k
        own, times = k[rows, :, :length], k.shape[2] // length
        if k.shape[2] % length or not torch.equal(k[rows], own.repeat(1, 1, times, 1)):
            raise InvalidInput(
                f"The model attends to {k.shape[2]} tokens, but the prompts of Prompt-to-Prompt have {length}. Sample "
                "with the conditioning that holds these prompts."
            )
        return k[:, :, :length]

    def _self_is_replaced(self, queries: int) -> bool:
        first, last = (int(share * self.steps) for share in self.edit.self_replace)
        return first <= self._step < last and queries <= self.edit.self_limit**2

    def _cross_is_edited(self) -> bool:
        return any(bool((target.factors(self._step, self.steps)[1] != 1).any()) for target in self.edit.targets)

    def _edit_maps(self, own: Tensor) -> Tensor:
        """Maps ``[P, heads, N, T]`` edited: eq. 4 (replace), its refinement, and eq. 5 (re-weighting)."""
        edited = [own[:1]]
        for (mapper, of_source, of_own), target in zip(self._factors(own), own[1:], strict=True):
            edited.append(((own[0] @ mapper) * of_source + target * of_own)[None])
        return torch.cat(edited)

    def _factors(self, like: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Mapper and factors of every target at this step, on the device of ``like``; made once per step."""
        if self._table_of != (self._step, like.device):
            self._table_of = (self._step, like.device)
            self._table = []
            for target in self.edit.targets:
                of_source, of_own = target.factors(self._step, self.steps)
                self._table.append((target.tokens.mapper.to(like), of_source.to(like), of_own.to(like)))
        return self._table
