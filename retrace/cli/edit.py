"""The standalone edit: invert an image, then sample it again with another prompt under a mask.

What the example graph "Invert and blend" does in ComfyUI, as one function of any :class:`Host`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

from torch import Tensor

from ..blending.blend import Blend, BlendSettings, NoiseMode
from ..blending.paste import paste_background
from ..blending.sample import Sampling, sample_blended
from ..core.checks import check_choice, check_image, check_mask, check_same_size, check_steps, match_batch
from ..core.errors import InvalidInput, InvalidSetting
from ..core.host import Conditioning, Denoiser, Host, Origin
from ..core.sampling import sample_ddim
from ..core.trajectory import Trajectory
from ..inversion.invert import InversionSettings, Method, invert
from ..masks import LatentMaskMode, latent_mask
from ..metrics import EditReport, edit_report

STAGES = ("invert", "reconstruct", "edit")
Sampler = Literal["euler", "euler_ancestral"]
Conditions = Mapping[str, Conditioning]
T = TypeVar("T")


@dataclass(frozen=True)
class EditSettings:
    """How to edit. The defaults are those of the example graph.

    ``strength`` in (0, 1] is the noise level that inversion and edit go up to: 1 lets the image under the mask be
    anything. ``background`` says what stands outside the mask at each step: the inversion's own path (``trajectory``),
    or the source with one noise (``fixed``) or a new one each step (``fresh``). ``cells`` says what a mask is on the
    latent grid, see :func:`latent_mask`; ``shrink`` > 0 begins with wider masks. ``sampler`` makes the edit, by
    its name in ComfyUI; inversion and reconstruction always use ``euler``. ``feather`` is the width in pixels, inside
    the mask, over which the edit fades into the source.
    """

    steps: int = 50
    guidance: float = 7.5
    strength: float = 1.0
    scheduler: str = "ddim_uniform"
    method: Method = "ddim"
    sampler: Sampler = "euler_ancestral"
    background: NoiseMode = "fresh"
    cells: LatentMaskMode = "area"
    shrink: int = 0
    feather: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)
        check_steps("shrink", self.shrink, minimum=0)
        if not 0 < self.strength <= 1:
            raise InvalidSetting(f"strength: got {self.strength}, but more than 0 and at most 1 is needed.")
        if not 0 <= self.guidance < math.inf:
            raise InvalidSetting(
                f"guidance: got {self.guidance}, but 0 or more is needed (1 is without guidance, 5 is usual)."
            )
        if not 0 <= self.feather < math.inf:
            raise InvalidSetting(f"feather: got {self.feather}, but a number of pixels of at least 0 is needed.")
        for name, choices in (
            ("method", get_args(Method)),
            ("sampler", get_args(Sampler)),
            ("background", get_args(NoiseMode)),
            ("cells", get_args(LatentMaskMode)),
        ):
            check_choice(name, getattr(self, name), choices)

    @property
    def walked_steps(self) -> int:
        """How many of the ``steps`` are walked, up and down: the last ``round(strength * steps)``, at least one."""
        return max(1, round(self.strength * self.steps))

    def walked(self, sigmas: Tensor) -> Tensor:
        """The levels of the schedule ``sigmas`` that are walked; all of them at strength 1."""
        return sigmas if self.strength == 1 else sigmas[-self.walked_steps - 1 :]


@dataclass(frozen=True)
class EditPrompts:
    """What the image shows (``source``, which steers the inversion), and what it should show (``target``).

    Lists hold one text for each image, where the host's ``encode_text`` takes lists (the diffusers host does).
    """

    source: str | Sequence[str]
    target: str | Sequence[str]
    negative: str = ""

    def check(self, batch: int) -> None:
        """Raise InvalidInput where a list does not fit ``batch`` images."""
        for name, words in (("source prompt", self.source), ("prompt", self.target)):
            if not isinstance(words, str) and len(words) != batch:
                raise InvalidInput(f"{name}: got {len(words)} texts for {batch} images; give one, or one for each.")


@dataclass(frozen=True)
class EditResult:
    """Images ``[B, H, W, 3]`` in 0..1 on the CPU, and how they came about.

    ``decoded`` is the VAE's own reconstruction, the best that ``reconstruction`` can be; ``painted`` is the edit as the
    VAE decoded it, without the source around it.
    """

    source: Tensor
    mask: Tensor
    decoded: Tensor
    reconstruction: Tensor
    painted: Tensor
    trajectory: Trajectory
    settings: EditSettings
    evaluations: dict[str, int]
    seconds: dict[str, float]

    @cached_property
    def edited(self) -> Tensor:
        """The edit inside the mask; outside it the source itself, bit for bit."""
        return paste_background(self.painted, self.source, self.mask, self.settings.feather)

    def scores(self) -> dict[str, EditReport]:
        """Scores against the source, inside and outside the mask, of ``vae``, ``reconstruction`` and ``edit``."""
        images = {"vae": self.decoded, "reconstruction": self.reconstruction, "edit": self.edited}
        return {name: edit_report(image, self.source, self.mask) for name, image in images.items()}

    def report(self) -> dict[str, object]:
        """Settings and cost as plain numbers and text; for quality see :meth:`scores`."""
        return {
            "settings": asdict(self.settings),
            "evaluations": self.evaluations,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "inversion": self.trajectory.report,
        }


def edit_image(
    host: Host,
    image: Tensor,
    mask: Tensor,
    prompts: EditPrompts,
    settings: EditSettings | None = None,
    *,
    on_stage: Callable[[str], None] | None = None,
) -> EditResult:
    """Edit ``image`` under ``mask`` so that it shows ``prompts.target``.

    Args:
        host: the model.
        image: ``[B, H, W, 3]`` in 0..1, sides multiples of ``host.downscale``.
        mask: ``[B or 1, H, W]`` in 0..1, 1 = edit.
        prompts: what the image shows, and what it should show.
        on_stage: called with each of :data:`STAGES` as it begins; steps are reported by the host.

    Raises:
        InvalidImage: not an image or a mask, sizes that differ or do not fit the model, an empty mask.
        InvalidInput: lists of prompts that do not fit the batch.
        InvalidSchedule: an unknown scheduler.
        RetraceError: the model answered NaN.
    """
    image = check_image("image", image).float().cpu()
    mask = check_mask("mask", mask, size=(image.shape[1], image.shape[2])).float().cpu()
    mask = match_batch(mask, image.shape[0], "mask")
    prompts.check(image.shape[0])
    return _Edit(host, image, mask, prompts, settings or EditSettings(), on_stage).run()


class _Edit:
    """One edit: its stages walk the same levels of noise under the same words, and count what they cost."""

    def __init__(
        self,
        host: Host,
        image: Tensor,
        mask: Tensor,
        prompts: EditPrompts,
        settings: EditSettings,
        on_stage: Callable[[str], None] | None,
    ) -> None:
        self.host, self.image, self.mask, self.settings = host, image, mask, settings
        self.on_stage = on_stage
        self.evaluations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.sigmas = settings.walked(host.sigmas(settings.scheduler, settings.steps))
        self.latent = host.encode_image(image).cpu()
        texts = {"source": prompts.source, "target": prompts.target, "negative": prompts.negative}
        self.conds = {name: host.encode_text(text) for name, text in texts.items()}

    def run(self) -> EditResult:
        """All stages, and their images."""
        trajectory = self._stage("invert", self._invert, self.latent)
        returned = self._stage("reconstruct", self._reconstruct, trajectory.noise)
        blend = self._blend(trajectory)
        painted = self._stage("edit", lambda model, x, given: self._paint(model, x, given, blend), self.latent)
        decoded, reconstruction, edit = (self._decode(x) for x in (self.latent, returned, painted))
        check_same_size("decoded image", decoded, "the image", self.image)
        return EditResult(
            source=self.image,
            mask=self.mask,
            decoded=decoded,
            reconstruction=reconstruction,
            painted=edit,
            trajectory=trajectory,
            settings=self.settings,
            evaluations=self.evaluations,
            seconds=self.seconds,
        )

    def _stage(self, name: str, method: Callable[[Denoiser, Tensor, Conditions], T], start: Tensor) -> T:
        """Run ``method`` in the host from the latent ``start``; its time and network evaluations are noted."""
        if self.on_stage is not None:
            self.on_stage(name)
        begun = time.perf_counter()

        def counted(model: Denoiser, x: Tensor, given: Conditions) -> T:
            before = model.evaluations
            result = method(model, x, given)
            self.evaluations[name] = model.evaluations - before
            return result

        gradients = name == "invert" and InversionSettings(self.settings.method).needs_gradients
        result = self.host.run(start, self.conds, counted, gradients=gradients)
        self.seconds[name] = time.perf_counter() - begun
        return result

    def _invert(self, model: Denoiser, x: Tensor, given: Conditions) -> Trajectory:
        return invert(
            model,
            x,
            self.sigmas,
            given["source"],
            InversionSettings(self.settings.method),
            Origin.of(self.host),
        )

    def _reconstruct(self, model: Denoiser, x: Tensor, given: Conditions) -> Tensor:
        return sample_ddim(model, x, self.sigmas, given["source"])

    def _blend(self, trajectory: Trajectory) -> Blend:
        size = (self.latent.shape[-2], self.latent.shape[-1])
        return Blend(
            trajectory,
            latent_mask(self.mask, mode=self.settings.cells, size=size),
            self.host.parametrisation,
            BlendSettings(noise=self.settings.background, stages=self.settings.shrink, seed=self.settings.seed),
        )

    def _paint(self, model: Denoiser, x: Tensor, given: Conditions, blend: Blend) -> Tensor:
        walk = Sampling(
            highest=float(self.host.training_sigmas()[-1]),
            scale=self.settings.guidance,
            ancestral=self.settings.sampler == "euler_ancestral",
            seed=self.settings.seed,
        )
        return sample_blended(model, x, self.sigmas, blend, given["target"], given["negative"], settings=walk)

    def _decode(self, latent: Tensor) -> Tensor:
        return self.host.decode_latent(latent).float().cpu()
