"""The weights that ship: complete, small, in half precision, with a card; and a CLIP that knows its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from retrace.core.errors import InvalidFile
from retrace.models.pebble import architecture
from retrace.models.pebble.clip import load_clip, normalise
from retrace.models.pebble.scenes import COLOURS, heldout, render_batch
from retrace.models.pebble.weights import OVERRIDE, weights_folder


def test_the_weights_are_at_most_24_megabytes_of_half_precision() -> None:
    files = sorted(weights_folder().rglob("*.safetensors"))
    assert [f.parent.name for f in files] == ["clip", "text_encoder", "unet", "vae"]
    assert sum(f.stat().st_size for f in files) <= 24e6
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_the_configurations_are_those_of_the_architecture() -> None:
    folder = weights_folder()
    for part, expected in (
        ("unet", architecture.UNET),
        ("vae", architecture.VAE),
        ("scheduler", architecture.SCHEDULER),
    ):
        file = next((folder / part).glob("*config.json"))
        config = json.loads(file.read_text(encoding="utf-8"))
        same = {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
        assert {k: config[k] for k in same} == same


def test_the_card_says_how_it_was_trained_and_what_was_measured() -> None:
    card = json.loads((weights_folder() / "card.json").read_text(encoding="utf-8"))
    for stage in ("vae", "clip", "unet"):
        assert {"steps", "seconds", "device", "losses"} <= card[stage].keys()
    assert {"vae_reconstruction", "clip_retrieval", "prompt_following", "blend_edits"} <= card["measured"].keys()


@pytest.mark.parametrize(
    ("measurement", "figure", "wanted"),
    [
        ("vae_reconstruction", "psnr_db", 30.0),
        ("parser_on_truth", "right", 0.99),
        ("prompt_following", "right", 0.90),
        ("clip_retrieval", "top1_of_32", 0.95),
        ("blend_edits", "success", 0.80),
        ("blend_edits", "identical_outside", 1.0),
    ],
)
def test_the_weights_that_ship_reach_what_was_asked(measurement: str, figure: str, wanted: float) -> None:
    """By the card, measured on many held-out scenes; tests/methods measures a few of them again."""
    card = json.loads((weights_folder() / "card.json").read_text(encoding="utf-8"))
    assert card["measured"][measurement][figure] >= wanted


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, str(tmp_path))
    with pytest.raises(InvalidFile, match=r"unet, vae, text_encoder, tokenizer missing.*install it again"):
        weights_folder()


def test_clip_tells_every_colour_from_the_others() -> None:
    model, tokenize = load_clip()
    scenes = [s for s in heldout(200, objects=1) if s.objects[0].size == ""][:48]
    ground = [s.ground.phrase() for s in scenes]
    wanted = torch.tensor([list(COLOURS).index(s.objects[0].colour) for s in scenes])
    with torch.inference_mode():
        image = model.encode_image(normalise(render_batch(scenes)), normalize=True)
        hits = 0
        for i, s in enumerate(scenes):
            prompts = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s.objects[0].shape} on {ground[i]}" for c in COLOURS]
            text = model.encode_text(tokenize(prompts), normalize=True)
            hits += int((image[i] @ text.T).argmax() == wanted[i])
    assert hits >= 46
