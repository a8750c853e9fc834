"""The standalone edit: invert a picture, then sample it again with another prompt under a mask.

What the example graph "Invert and blend" does in ComfyUI, as one function of any :class:`Host`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ..blending.blend import Blend, NoiseMode
from ..blending.paste import paste_background
from ..blending.sample import sample_blended
from ..core.checks import check_image, check_mask, check_same_size, check_steps, match_batch
from ..core.errors import InvalidSchedule, RetraceError
from ..core.host import Conditioning, Denoiser, Host, Origin
from ..core.sampling import sample_ddim
from ..core.trajectory import Trajectory
from ..inversion.invert import InversionSettings, Method, invert
from ..masks import LatentMaskMode, latent_mask
from ..metrics import EditReport, edit_report

STAGES = ("invert", "reconstruct", "edit")
Sampler = Literal["euler", "euler_ancestral"]


@dataclass(frozen=True)
class EditSettings:
    """How to edit. The defaults are those of the example graph.

    ``strength`` in (0, 1] is the noise level that inversion and edit go up to: 1 lets the picture under the mask be
    anything. ``background`` says what stands outside the mask at each step: the inversion's own path (``trajectory``),
    or the source with one noise (``fixed``) or a new one each step (``fresh``). ``cells`` says what a mask is on the
    latent grid, see :func:`latent_mask`; ``shrink`` > 0 begins with wider masks. ``sampler`` paints, by
    its name in ComfyUI; inversion and reconstruction are ``euler`` always. ``feather`` is the width in pixels, inside
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
        if not 0 < self.strength <= 1:
            raise InvalidSchedule(f"strength: got {self.strength}, but more than 0 and at most 1 is needed.")
        if self.sampler not in get_args(Sampler):
            raise InvalidSchedule(
                f"sampler: got {self.sampler!r}, but one of {', '.join(get_args(Sampler))} is needed."
            )
        if not 0 <= self.guidance < math.inf:
            raise RetraceError(
                f"guidance: got {self.guidance}, but 0 or more is needed (1 is without guidance, 5 usual)."
            )

    @property
    def walked_steps(self) -> int:
        """How many of the ``steps`` are walked, up and down: the last ``round(strength * steps)``, at least one."""
        return max(1, round(self.strength * self.steps))

    def walked(self, sigmas: Tensor) -> Tensor:
        """The levels of the schedule ``sigmas`` that are walked; all of them at strength 1."""
        return sigmas if self.strength == 1 else sigmas[-self.walked_steps - 1 :]


@dataclass(frozen=True)
class EditResult:
    """Pictures ``[B, H, W, 3]`` in 0..1 on the CPU, and how they came about.

    ``decoded`` is the VAE's own reconstruction, the best that ``reconstruction`` can be; ``edited`` is the source
    itself outside the mask. ``unpasted`` is the edit as the VAE decoded it, for who pastes at another size.
    """

    source: Tensor
    mask: Tensor
    decoded: Tensor
    reconstruction: Tensor
    edited: Tensor
    unpasted: Tensor
    trajectory: Trajectory
    settings: EditSettings
    evaluations: dict[str, int]
    seconds: dict[str, float]

    def scores(self) -> dict[str, EditReport]:
        """Scores against the source, inside and outside the mask, of ``vae``, ``reconstruction`` and ``edit``."""
        pictures = {"vae": self.decoded, "reconstruction": self.reconstruction, "edit": self.edited}
        return {name: edit_report(picture, self.source, self.mask) for name, picture in pictures.items()}

    def report(self) -> dict[str, Any]:
        """Settings, cost and scores as plain numbers and text."""
        return {
            "settings": asdict(self.settings),
            "evaluations": self.evaluations,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "inversion": self.trajectory.report,
            "scores": {name: report.to_dict() for name, report in self.scores().items()},
        }


def edit_image(
    host: Host,
    image: Tensor,
    mask: Tensor,
    source_prompt: str | Sequence[str],
    prompt: str | Sequence[str],
    settings: EditSettings | None = None,
    *,
    negative_prompt: str = "",
    on_stage: Callable[[str], None] | None = None,
) -> EditResult:
    """Edit ``image`` under ``mask`` so that it shows ``prompt``.

    Args:
        host: the model.
        image: ``[B, H, W, 3]`` in 0..1, sides multiples of ``host.downscale``.
        mask: ``[B or 1, H, W]`` in 0..1, 1 = edit.
        source_prompt: what the picture shows now; steers the inversion. A list holds one for each image, where the
            host's ``encode_text`` takes lists (the diffusers host does).
        prompt: what it shall show, or a list as above.
        on_stage: called with each of :data:`STAGES` as it begins; steps are reported by the host.

    Raises:
        InvalidImage: not a picture or a mask, sizes that differ or do not fit the model, an empty mask.
        InvalidSchedule: steps, strength or a scheduler that cannot be.
        RetraceError: the model answered NaN.
    """
    settings = settings or EditSettings()
    image = check_image("image", image).float().cpu()
    mask = check_mask("mask", mask, size=(image.shape[1], image.shape[2])).float().cpu()
    mask = match_batch(mask, image.shape[0], "mask")
    sigmas = settings.walked(host.sigmas(settings.scheduler, settings.steps))
    latent = host.encode_image(image).cpu()
    for name, words in (("source_prompt", source_prompt), ("prompt", prompt)):
        if not isinstance(words, str) and len(words) != len(image):
            raise RetraceError(f"{name}: got {len(words)} texts for {len(image)} images; give one, or one for each.")
    texts: dict[str, Any] = {"source": source_prompt, "prompt": prompt, "negative": negative_prompt}
    conds = {name: host.encode_text(text) for name, text in texts.items()}
    evaluations: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def stage(name: str, method: Callable[[Denoiser, Tensor, Mapping[str, Conditioning]], Any], start: Tensor) -> Any:
        if on_stage is not None:
            on_stage(name)
        begun = time.perf_counter()

        def counted(model: Denoiser, x: Tensor, given: Mapping[str, Conditioning]) -> Any:
            before = model.evaluations
            result = method(model, x, given)
            evaluations[name] = model.evaluations - before
            return result

        gradients = name == "invert" and InversionSettings(settings.method).needs_gradients
        result = host.run(start, conds, counted, gradients=gradients)
        seconds[name] = time.perf_counter() - begun
        return result

    trajectory: Trajectory = stage(
        "invert",
        lambda model, x, given: invert(
            model,
            x,
            sigmas,
            given["source"],
            InversionSettings(settings.method),
            Origin.of(host),
        ),
        latent,
    )
    returned: Tensor = stage(
        "reconstruct", lambda model, x, given: sample_ddim(model, x, sigmas, given["source"]), trajectory.noise
    )
    blend = Blend(
        trajectory,
        latent_mask(mask, mode=settings.cells, size=(latent.shape[-2], latent.shape[-1])),
        host.parametrisation,
        noise=settings.background,
        stages=settings.shrink,
        seed=settings.seed,
    )

    def paint(model: Denoiser, x: Tensor, given: Mapping[str, Conditioning]) -> Tensor:
        return sample_blended(
            model,
            x,
            sigmas,
            blend,
            given["prompt"],
            given["negative"],
            settings.guidance,
            highest=float(host.training_sigmas()[-1]),
            ancestral=settings.sampler == "euler_ancestral",
            seed=settings.seed,
        )

    painted: Tensor = stage("edit", paint, latent)
    decoded, reconstruction, edited = (host.decode_latent(x).float().cpu() for x in (latent, returned, painted))
    check_same_size("decoded image", decoded, "the image", image)
    return EditResult(
        source=image,
        mask=mask,
        decoded=decoded,
        reconstruction=reconstruction,
        edited=paste_background(edited, image, mask, settings.feather),
        unpasted=edited,
        trajectory=trajectory,
        settings=settings,
        evaluations=evaluations,
        seconds=seconds,
    )
