"""``python -m benchmarks.reweight``: does the weight of a word move what the word says, and only in one direction?

Held-out scenes with one object are inverted and sampled again with their own words, where the colour of the object
counts more or less (Prompt-to-Prompt's re-weighting; Direct Inversion holds the source). Measured is how much of the
named colour the object has: the part of its mean colour, less grey, that points where the named one does, relative to
weight 1.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from retrace import prompt_to_prompt as p2p
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion.invert import invert
from retrace.models.pebble.scenes import COLOURS, Scene, instance_masks, render_batch, sample_scene, scene_rng

from .pebble import to_nhwc
from .results import Section, Table, add_write

SECTION = Section(
    "reweight",
    "Weights of words",
    "How much of the named colour an object has when the weight of that word changes; weight 1 counts as 1.",
)
STEPS, GUIDANCE = 50, 5.0
FIRST = 400_000  # of the held-out scenes; no other measurement looks at these
WEIGHTS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
HUES = ("red", "orange", "yellow", "green", "blue", "purple")


def coloured_scenes(count: int, split: str = "heldout", first: int = FIRST) -> list[Scene]:
    """Scenes with one object that has a hue."""
    scenes: list[Scene] = []
    index = first
    while len(scenes) < count:
        scene = sample_scene(scene_rng(split, index), objects=1)
        if scene.objects[0].colour in HUES:
            scenes.append(scene)
        index += 1
    return scenes


def share_of_colour(image: Tensor, inside: Tensor, name: str) -> float:
    """How much of the named colour ``image`` ``[H, W, 3]`` has where ``inside`` ``[H, W]`` is true; all of it is 1."""
    named, seen = torch.tensor(COLOURS[name]), image[inside].mean(0)
    direction = named - named.mean()
    return float((seen - seen.mean()) @ direction / (direction @ direction))


def reweighted(host: DiffusersHost, scene: Scene, word: str) -> Tensor:
    """The scene at every weight of ``word``, ``[weights, H, W, 3]``."""
    text = scene.caption()
    prompts = host.read_prompts([text, text])
    sigmas = host.sigmas("ddim_uniform", STEPS)
    conds = {"source": host.encode_text(text), "both": host.encode_text([text, text]), "empty": host.encode_text("")}

    def work(model: Any, latent: Tensor, c: Any) -> Tensor:
        path = invert(model, latent, sigmas, c["source"])

        def sampled(weight: float) -> Tensor:
            settings = p2p.PlanSettings(cross_replace=(0.0, 1.0), self_replace=(0.0, 0.0), weights={word: weight})
            options = p2p.EditSampling(p2p.plan(prompts[0], prompts[1:], settings), source=path)
            return p2p.sample_edit(model, path.noise, sigmas, c["both"], c["empty"], GUIDANCE, options)[1:]

        return torch.cat([sampled(weight) for weight in WEIGHTS])

    picture = to_nhwc(render_batch([scene]))
    return host.decode_latent(host.run(host.encode_image(picture), conds, work))


def measure(host: DiffusersHost, scene: Scene) -> list[float]:
    """The share of the colour at every weight, relative to weight 1."""
    inside = instance_masks(scene, margin=-4.0)[0] > 0.5
    colour = scene.objects[0].colour
    values = [share_of_colour(image, inside, colour) for image in reweighted(host, scene, colour)]
    return [value / values[WEIGHTS.index(1.0)] for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=24)
    add_write(parser)
    args = parser.parse_args()
    host = DiffusersHost.load(None)
    values = torch.tensor([measure(host, scene) for scene in coloured_scenes(args.scenes)])
    conditions = f"{args.scenes} scenes, {STEPS} steps, guidance {GUIDANCE:g}"
    print(f"{conditions}; the colour relative to weight 1\n")
    table = Table("weight", *(f"{w:g}" for w in WEIGHTS))
    table.add("mean", *(f"{v:.2f}" for v in values.mean(0).tolist()))
    # From one weight to the next: by more than a shade of 8 bits in the same direction, or not at all.
    rising = (values.diff(dim=1) > -0.01).float().mean(0)
    table.add("scenes that rise from the weight before", "", *(f"{v:.0%}" for v in rising.tolist()))
    if args.write:
        SECTION.write(table, conditions)


if __name__ == "__main__":
    main()
