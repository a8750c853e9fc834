"""``python -m benchmarks.editing``: editing a real picture by words, method against method, on Pebble.

On held-out scenes of one object, the colour or the shape is changed in the words. The table shows how often the scene
parser finds what was asked for, what happened to the background (PSNR in dB against the picture itself, outside the
object as it was, as it was asked for, and a margin of 6 px), and what inversion and edit cost together: network
evaluations and seconds per edit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from retrace import prompt_to_prompt as p2p
from retrace.core.host import Conditioning
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion.edit_friendly import EditFriendlySettings, invert_edit_friendly, sample_edit_friendly
from retrace.inversion.invert import invert
from retrace.inversion.null_text.optimise import optimise_null_text
from retrace.inversion.null_text.settings import NullTextSettings, Start
from retrace.metrics import psnr
from retrace.models.pebble.scenes import COLOURS, SHAPES, Scene, heldout, instance_masks, render_batch
from retrace.prompt_to_prompt.proximal import Proximal
from tools.scene_parser import found

from .pebble import to_nhwc
from .results import Section, Table, add_write

SECTION = Section(
    "editing",
    "Editing by words",
    "Another colour or another shape for the object of a held-out scene. Share of the edits in which the scene "
    "parser finds what was asked for, PSNR of the background, and the cost including the inversion.",
)
STEPS, GUIDANCE, MARGIN = 50, 7.5, 6
FIRST = 200_000  # of the held-out scenes; no other measurement looks at these
SHARES = {"colour": (0.8, 0.4), "shape": (0.3, 0.05)}  # cross_replace and self_replace; a new shape needs room


@dataclass(frozen=True)
class Task:
    """One edit: a picture, the scene it shows, the scene it should show."""

    kind: str
    source: Scene
    target: Scene

    @property
    def texts(self) -> list[str]:
        return [self.source.caption(), self.target.caption()]


@dataclass(frozen=True)
class Setting:
    """What every method gets."""

    model: Any
    latent: Tensor
    sigmas: Tensor
    conds: Any
    edit: p2p.PromptToPrompt

    def inverted(self) -> Any:
        return invert(self.model, self.latent, self.sigmas, self.conds["source"])

    def sample(self, noise: Tensor, options: p2p.EditSampling, uncond: Conditioning | None = None) -> Tensor:
        """The edited latent."""
        negative = self.conds["empty"] if uncond is None else uncond
        return p2p.sample_edit(self.model, noise, self.sigmas, self.conds["all"], negative, GUIDANCE, options)[1:]


def resampled(s: Setting) -> Tensor:
    return s.sample(s.inverted().noise, p2p.EditSampling())


def ddim(s: Setting) -> Tensor:
    return s.sample(s.inverted().noise, p2p.EditSampling(s.edit))


def null_text(s: Setting, start: Start = "cond") -> Tensor:
    path = s.inverted()
    settings = NullTextSettings(GUIDANCE, start=start)
    optimised = optimise_null_text(s.model, path, s.conds["source"], s.conds["empty"], settings, only_text_differs=True)
    return s.sample(path.noise, p2p.EditSampling(s.edit, null_text=list(optimised.embeddings)))


def null_text_from_negative(s: Setting) -> Tensor:
    return null_text(s, "uncond")


def negative_prompt(s: Setting) -> Tensor:
    options = p2p.EditSampling(s.edit, source_needs_no_guidance=True, proximal=Proximal(0.7))
    return s.sample(s.inverted().noise, options, uncond=s.conds["source"])


def direct(s: Setting) -> Tensor:
    path = s.inverted()
    return s.sample(path.noise, p2p.EditSampling(s.edit, source=path))


def edit_friendly(s: Setting) -> Tensor:
    settings = EditFriendlySettings(3.5, seed=0)
    found_noise = invert_edit_friendly(s.model, s.latent, s.sigmas, s.conds["source"], s.conds["empty"], settings)
    return sample_edit_friendly(s.model, found_noise, s.conds["target"], s.conds["empty"], GUIDANCE, skip=STEPS // 3)


METHODS: dict[str, tuple[Callable[[Setting], Tensor], bool]] = {
    "sampled again from the same noise": (resampled, False),
    "DDIM + P2P": (ddim, False),
    "Null-text from the prompt + P2P": (null_text, False),
    "Null-text from the empty prompt + P2P": (null_text_from_negative, False),
    "Negative prompt, proximal + P2P": (negative_prompt, False),
    "Direct Inversion + P2P": (direct, False),
    "Direct Inversion + P2P, local blend": (direct, True),
    "Edit-friendly DDPM": (edit_friendly, False),
}


def tasks(kind: str, count: int) -> list[Task]:
    """``count`` scenes of one object, each with another colour or shape for it."""
    made = []
    for number, scene in enumerate(heldout(count, FIRST, objects=1)):
        thing = scene.objects[0]
        if kind == "colour":
            others = [c for c in COLOURS if c != thing.colour]
            new = replace(thing, colour=others[number % len(others)])
        else:
            shapes = [s for s in SHAPES if s != thing.shape]
            new = replace(thing, shape=shapes[number % len(shapes)])
        made.append(Task(kind, scene, replace(scene, objects=(new,))))
    return made


def run(host: DiffusersHost, task: Task, method: Callable[[Setting], Tensor], blend: bool) -> tuple[bool, float, int]:
    """Whether it worked, PSNR of the background in dB, evaluations."""
    picture = to_nhwc(render_batch([task.source]))
    prompts = host.read_prompts(task.texts)
    words = [o.colour if task.kind == "colour" else o.shape for o in (*task.source.objects, *task.target.objects)]
    words += [task.source.objects[0].shape]
    cross, self_attention = SHARES[task.kind]
    settings = p2p.PlanSettings(cross_replace=(0.0, cross), self_replace=(0.0, self_attention))
    local = p2p.local_blend(prompts, p2p.BlendWords(words)) if blend else None
    edit = p2p.plan(prompts[0], prompts[1:], settings, local)
    source, target = task.texts
    conds = {"source": source, "target": target, "all": task.texts, "empty": ""}
    sigmas = host.sigmas("ddim_uniform", STEPS)

    def work(model: Any, latent: Tensor, prepared: Any) -> tuple[Tensor, int]:
        edited = method(Setting(model, latent, sigmas, prepared, edit))
        return edited, int(model.evaluations)

    encoded = {name: host.encode_text(words) for name, words in conds.items()}
    gradients = method in (null_text, null_text_from_negative)
    latent, evaluations = host.run(host.encode_image(picture), encoded, work, gradients=gradients)
    image = host.decode_latent(latent)
    outside = (instance_masks(task.source, MARGIN) + instance_masks(task.target, MARGIN)) < 0.5
    new = task.target.objects[0]
    hit = found(image[0].movedim(-1, 0), new.colour, new.shape)
    return hit, float(psnr(image, picture, outside)[0]), evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=50, help="of each kind of edit")
    parser.add_argument("--only", nargs="*", help="words of the methods' names")
    add_write(parser)
    args = parser.parse_args()
    host = DiffusersHost.load(None)
    pictures = to_nhwc(render_batch(heldout(args.scenes, FIRST, objects=1)))
    bound = float(psnr(host.decode_latent(host.encode_image(pictures)), pictures).mean())
    conditions = f"{args.scenes} scenes of each kind, {STEPS} steps, guidance {GUIDANCE}, autoencoder {bound:.1f} dB"
    print(f"{conditions}\n")
    table = Table("method", "colour", "background", "shape", "background", "evaluations", "seconds")
    for name, (method, blend) in METHODS.items():
        if args.only and not any(word.lower() in name.lower() for word in args.only):
            continue
        cells, costs = [], []
        started = time.perf_counter()
        for kind in SHARES:
            results = [run(host, task, method, blend) for task in tasks(kind, args.scenes)]
            cells += [f"{sum(hit for hit, *_ in results) / len(results):.0%}"]
            cells += [f"{sum(db for _, db, _ in results) / len(results):.1f} dB"]
            costs += [evaluations for *_, evaluations in results]
        seconds = (time.perf_counter() - started) / len(costs)
        table.add(name, *cells, f"{sum(costs) / len(costs):.0f}", f"{seconds:.1f}")
    if args.write:
        SECTION.write(table, conditions)


if __name__ == "__main__":
    main()
