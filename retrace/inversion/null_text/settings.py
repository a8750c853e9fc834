"""What a user may choose of null-text optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ...core.checks import check_steps
from ...core.errors import InvalidSetting

Mode = Literal["pivotal", "global", "random_pivot", "no_pivot", "prompt", "prompt_no_pivot"]
MODES: tuple[Mode, ...] = get_args(Mode)
PROMPT_MODES: frozenset[Mode] = frozenset({"prompt", "prompt_no_pivot"})
"""Modes that change the embedding of the prompt and leave the unconditional one alone."""

Start = Literal["cond", "uncond"]
Loop = Literal["quick", "reference"]
REFERENCE_STEPS = 50


@dataclass(frozen=True)
class NullTextSettings:
    """How to optimise; :meth:`reference` is the published code to the letter.

    Attributes:
        scale: the guidance that edits will use.
        mode: ``pivotal`` is the method, the others are the paper's ablations: ``global`` one embedding for all steps,
            trained in ``iterations`` rounds over the pivots; ``random_pivot`` pivots on the straight line from the
            image to one random noise; ``no_pivot`` fresh noise in every iteration; ``prompt`` and ``prompt_no_pivot``
            as ``pivotal`` and ``no_pivot``, but changing the embedding of the prompt.
        iterations: most changes of an embedding per step.
        learning_rate: of step i of N, ``learning_rate * (1 - i / 2N)``.
        early_stop: step i is finished when its loss is below ``early_stop + 2e-5 * 50 i / N``; 0 never stops early.
        seed: or a generator, for the noise of ``random_pivot``, ``no_pivot`` and ``prompt_no_pivot``.
        start: the embedding that the quick loop begins with. At that of ``cond`` there is little to change (negative-
            prompt inversion). From that of ``uncond``, where the paper begins, it takes about five times the
            evaluations, and the way back is as good; but the result stays near an empty prompt, so guidance pushes a
            later edit less far away from all that the source shows. All else begins at what it changes.
        loop: ``quick`` asks for the conditional estimate once per step and looks at the loss before it pays for a
            backward pass, so that the prediction that meets the threshold also advances: 2 + k evaluations for a step
            of k changes, or 1. ``reference`` looks after each change and evaluates both conditions again: 3 + k.
        schedule_steps: the N of learning rate and threshold; None: the steps of the trajectory.

    Raises:
        InvalidSetting: a value out of its range, or a guidance at which the embedding has no influence.
    """

    scale: float = 7.5
    mode: Mode = "pivotal"
    iterations: int = 10
    learning_rate: float = 1e-2
    early_stop: float = 1e-5
    seed: int | torch.Generator = 0
    start: Start = "cond"
    loop: Loop = "quick"
    schedule_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("Null-text mode", self.mode, MODES),
            ("start", self.start, get_args(Start)),
            ("loop", self.loop, get_args(Loop)),
        ):
            if value not in known:
                raise InvalidSetting(f"{name}: got '{value}', but one of {', '.join(known)} is needed.")
        # Without influence on the guided estimate an embedding cannot be optimised.
        useless = 0.0 if self.changes_prompt else 1.0
        if not math.isfinite(self.scale) or self.scale == useless:
            raise InvalidSetting(
                f"Guidance: got {self.scale}, at which the embedding that mode '{self.mode}' optimises has no "
                "influence. Give the guidance that the edits will use, for example 7.5."
            )
        check_steps("iterations", self.iterations, 1)
        if not 0 < self.learning_rate < math.inf:
            raise InvalidSetting(f"learning_rate: got {self.learning_rate}, but a number above 0 is needed (try 0.01).")
        if not 0 <= self.early_stop < math.inf:
            raise InvalidSetting(f"early_stop: got {self.early_stop}, but a loss of 0 or more is needed (try 1e-5).")

    def reference(self) -> NullTextSettings:
        """These settings with the loop and the schedule of the published code (google/prompt-to-prompt).

        Learning rate and threshold are those of 50 steps for any number of steps.
        """
        return replace(self, loop="reference", schedule_steps=REFERENCE_STEPS)

    @property
    def changes_prompt(self) -> bool:
        """Whether the embedding of the prompt is optimised, instead of the unconditional one."""
        return self.mode in PROMPT_MODES

    @property
    def quick(self) -> bool:
        """Whether the quick loop runs: the ablations always have the reference's."""
        return self.loop == "quick" and self.mode == "pivotal"

    @property
    def starts_at_prompt(self) -> bool:
        return self.quick and self.start == "cond"
