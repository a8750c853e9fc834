"""How to drag, in one object that travels from the program or the node to the loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...core.errors import InvalidSchedule, InvalidSetting
from ...inversion.invert import Method

Mode = Literal["dragdiffusion", "gooddrag"]
MODES: tuple[Mode, ...] = get_args(Mode)
Cells = Literal["touched", "sampled"]


@dataclass(frozen=True)
class DragOptions:
    """What DragDiffusion's loop works with; the defaults are those of its code. Radii are in cells of the grid."""

    changes: int = 80  # at most
    learning_rate: float = 0.01
    patch_radius: int = 1
    search_radius: int = 3
    stop_radius: float = 2.0
    mask_weight: float = 0.1
    look_at_end: bool = True


@dataclass(frozen=True)
class GoodDragOptions:
    """What GoodDrag's loop works with; the defaults are those of its interface. Radii, strides in cells of the grid."""

    levels: int = 7  # at how many noise levels it drags, counted from the first; fewer than there are steps
    rounds: int = 10  # how often the points are found again at each of them
    changes: int = 3  # per round
    limit: int = 210  # changes in all, at most
    learning_rate: float = 0.02
    patch_radius: int = 4
    search_radius: int = 12
    stride: float = 4.0
    stop_radius: float = 2.0
    mask_weight: float = 0.2
    patience: int = 10  # rounds in a row in which no point moves, after which it gives up
    look_at_end: bool = True


@dataclass(frozen=True)
class DragSettings:
    """How to drag; None is what the authors of the mode use, :meth:`reference` what their code does in everything.

    Args:
        mode: ``"dragdiffusion"`` makes all changes at one noise level, ``"gooddrag"`` drags and denoises in turns.
        changes: the most changes of the latent, over all noise levels.
        learning_rate: of Adam, on a latent of unit variance.
        mask_weight: how much changes outside a soft mask are punished.
        patch_radius: of the patch around a point that moves with it, in cells of the grid.
        search_radius: how far around its last place a point is looked for, in cells of the grid.
        stop_radius: how near to its target a point has arrived, in cells of the grid.
        hard_mask: the latent outside the mask stays exactly, as in DragFlow; otherwise changes of the next lower latent
            there are punished, as in the papers.
        block: the feature block; ``"auto"`` is the paper's, see :func:`.task.choose_block`.
        recompute: saves memory, see :meth:`Denoiser.differentiable`; None tries without, and begins again with it once
            memory has run out.
        inversion: how the latent of an image comes to the noise level of the drag.
        levels: at how many noise levels GoodDrag drags; None: see :func:`levels_of`.
        look_at_end: after the last change, look once more at where it led.
        cells: which cells of the latent a mask frees: all that it ``"touched"``, or those where it is set at one
            ``"sampled"`` pixel.
        cut: where nothing beyond the feature block is needed, the network stops there.
        scaled_start: an inverted latent begins with the variance that latents have at the lowest noise level.

    Raises:
        InvalidSetting: a number out of its range, an unknown choice.
    """

    mode: Mode = "dragdiffusion"
    changes: int | None = None
    learning_rate: float | None = None
    mask_weight: float | None = None
    patch_radius: int | None = None
    search_radius: int | None = None
    stop_radius: float = 2.0
    hard_mask: bool = False
    block: str = "auto"
    recompute: bool | None = None
    inversion: Method = "fixed_point"
    levels: int | None = None
    look_at_end: bool = True
    cells: Cells = "touched"
    cut: bool = True
    scaled_start: bool = False

    @classmethod
    def reference(cls, mode: Mode = "dragdiffusion") -> DragSettings:
        """What the authors' code does, to the letter; its noise levels are the grid ``leading_1``.

        It inverts by DDIM a latent that it takes for one at the lowest noise level, reads the mask at one pixel per
        cell, always runs the whole network, drags at seven noise levels whatever the number of steps (GoodDrag), and
        does not look where the last change led.
        """
        return cls(
            mode=mode,
            inversion="ddim",
            levels=7,
            look_at_end=False,
            cells="sampled",
            cut=False,
            scaled_start=True,
        )

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("cells", self.cells, get_args(Cells))):
            if value not in known:
                raise InvalidSetting(f"{name}: got '{value}', but one of {', '.join(known)} is needed.")
        wholes = (
            ("changes", self.changes, 1),
            ("levels", self.levels, 1),
            ("search_radius", self.search_radius, 1),
            ("patch_radius", self.patch_radius, 1 if self.mode == "gooddrag" else 0),
        )
        for name, whole, least in wholes:
            if whole is not None and whole < least:
                raise InvalidSetting(f"{name}: got {whole}, but at least {least} is needed in mode '{self.mode}'.")
        numbers = (
            ("learning_rate", self.learning_rate),
            ("mask_weight", self.mask_weight),
            ("stop_radius", self.stop_radius),
        )
        for name, number in numbers:
            if number is not None and not 0 <= number < math.inf:
                raise InvalidSetting(f"{name}: got {number}, but a number of 0 or more is needed.")

    def options(self, steps: int) -> DragOptions | GoodDragOptions:
        """What the loop of the mode works with where ``steps`` are left to sample.

        Raises:
            InvalidSchedule: a single step, in GoodDrag.
        """
        return self._gooddrag(steps) if self.mode == "gooddrag" else self._dragdiffusion()

    def _dragdiffusion(self) -> DragOptions:
        usual = DragOptions()
        return DragOptions(
            changes=usual.changes if self.changes is None else self.changes,
            learning_rate=usual.learning_rate if self.learning_rate is None else self.learning_rate,
            patch_radius=usual.patch_radius if self.patch_radius is None else self.patch_radius,
            search_radius=usual.search_radius if self.search_radius is None else self.search_radius,
            stop_radius=self.stop_radius,
            mask_weight=usual.mask_weight if self.mask_weight is None else self.mask_weight,
            look_at_end=self.look_at_end,
        )

    def _gooddrag(self, steps: int) -> GoodDragOptions:
        """A round stays as long as it is: with more or fewer changes there are more or fewer rounds at each level."""
        usual = GoodDragOptions()
        levels = levels_of(steps, self.levels)
        rounds = usual.rounds if self.changes is None else math.ceil(self.changes / (levels * usual.changes))
        return GoodDragOptions(
            levels=levels,
            rounds=rounds,
            limit=levels * rounds * usual.changes if self.changes is None else self.changes,
            learning_rate=usual.learning_rate if self.learning_rate is None else self.learning_rate,
            patch_radius=usual.patch_radius if self.patch_radius is None else self.patch_radius,
            search_radius=usual.search_radius if self.search_radius is None else self.search_radius,
            stop_radius=self.stop_radius,
            mask_weight=usual.mask_weight if self.mask_weight is None else self.mask_weight,
            look_at_end=self.look_at_end,
        )


def levels_of(steps: int, wanted: int | None = None) -> int:
    """At how many of ``steps`` noise levels GoodDrag drags: ``wanted``, or the authors' share, 7 of 38.

    Further down the image can hardly be changed. At least one level, and a step is left undragged.

    Raises:
        InvalidSchedule: a single step.
    """
    if steps < 2:
        raise InvalidSchedule(
            f"GoodDrag: it drags and denoises in turns, but only {steps} step is left to sample. Raise steps or "
            "strength."
        )
    return min(wanted or max(1, round(steps * 7 / 38)), steps - 1)
