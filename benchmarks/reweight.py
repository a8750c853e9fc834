"""``python -m benchmarks.reweight``: does a word's weight move what the word says, and only in one direction?

Held-out scenes with one object on a striped ground are inverted and sampled again with their own words, where
"striped" or the colour of the object counts more or less (Prompt-to-Prompt's re-weighting, Direct Inversion holds the
source). Measured are the contrast of the stripes (standard deviation of the ground without its shading) and the
strength of the colour (its distance from grey), each relative to the picture that comes back at weight 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrace import prompt_to_prompt as p2p
from retrace.hosts.diffusers import DiffusersHost
from retrace.inversion import invert
from retrace.pebble.scenes import Scene, instance_masks, render_batch, sample_scene, scene_rng

STEPS, GUIDANCE = 50, 5.0
FIRST = 400_000  # of the held-out scenes; no other measurement looks at these
WEIGHTS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
HUES = ("red", "orange", "yellow", "green", "blue", "purple")


def striped_scenes(count: int, split: str = "heldout", first: int = FIRST) -> list[Scene]:
    """Scenes with one object that has a hue, on stripes."""
    scenes: list[Scene] = []
    index = first
    while len(scenes) < count:
        scene = sample_scene(scene_rng(split, index), objects=1)
        if scene.objects[0].colour in HUES:
            scenes.append(replace(scene, ground=replace(scene.ground, texture="striped")))
        index += 1
    return scenes


def contrast(image: Tensor, ground: Tensor) -> float:
    """Of ``image`` ``[H, W, 3]`` where ``ground`` ``[H, W]`` is true: what a plane of light does not explain."""
    height, width = ground.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1)[ground]
    grey = image.mean(-1)[ground][:, None]
    return float((grey - plane @ torch.linalg.lstsq(plane, grey).solution).std())


def colourfulness(image: Tensor, inside: Tensor) -> float:
    """Distance from grey of the mean colour of ``image`` ``[H, W, 3]`` where ``inside`` ``[H, W]`` is true."""
    colour = image[inside].mean(0)
    return float((colour - colour.mean()).norm())


def reweighted(host: DiffusersHost, scene: Scene, word: str) -> Tensor:
    """The scene at every weight of ``word``, ``[weights, H, W, 3]``."""
    text = scene.caption()
    prompts = host.read_prompts([text, text])
    sigmas = host.sigmas("ddim_uniform", STEPS)
    conds = {"source": host.encode_text(text), "both": host.encode_text([text, text]), "empty": host.encode_text("")}

    def work(model: Any, latent: Tensor, c: Any) -> Tensor:
        path = invert(model, latent, sigmas, c["source"], method="ddim")
        edits = [
            p2p.plan(prompts[0], prompts[1:], cross_replace=(0.0, 1.0), self_replace=(0.0, 0.0), weights={word: weight})
            for weight in WEIGHTS
        ]
        samples = [
            p2p.sample_edit(model, path.noise, sigmas, c["both"], c["empty"], GUIDANCE, edit=edit, source=path)[1:]
            for edit in edits
        ]
        return torch.cat(samples)

    picture = render_batch([scene]).permute(0, 2, 3, 1)
    return host.decode_latent(host.run(host.encode_image(picture), conds, work))


def measure(host: DiffusersHost, scene: Scene) -> dict[str, list[float]]:
    """Stripe contrast and colour strength at every weight, relative to weight 1."""
    ground = instance_masks(scene, margin=6.0)[0] < 0.5
    inside = instance_masks(scene, margin=-4.0)[0] > 0.5
    found = {
        "striped": [contrast(image, ground) for image in reweighted(host, scene, "striped")],
        "colour": [colourfulness(image, inside) for image in reweighted(host, scene, scene.objects[0].colour)],
    }
    one = WEIGHTS.index(1.0)
    return {name: [value / values[one] for value in values] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=24)
    args = parser.parse_args()
    host = DiffusersHost.load(None)
    results = [measure(host, scene) for scene in striped_scenes(args.scenes)]
    print(f"{args.scenes} scenes, {STEPS} steps, guidance {GUIDANCE}; relative to weight 1\n")
    print("| word | " + " | ".join(f"{w:g}" for w in WEIGHTS) + " | steps up in the same direction |")
    print("|---|" + "---|" * (len(WEIGHTS) + 1))
    for name in ("striped", "colour"):
        values = torch.tensor([result[name] for result in results])
        rising = (values.diff(dim=1) >= 0).float().mean()
        cells = " | ".join(f"{v:.2f}" for v in values.mean(0).tolist())
        print(f"| {name} | {cells} | {rising:.0%} |")


if __name__ == "__main__":
    main()
