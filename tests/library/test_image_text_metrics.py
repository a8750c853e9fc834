"""CLIP scores and structure distance, alone and in the report.

A stand-in whose vectors are mean colours gives every CLIP score a closed form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from retrace.core.errors import InvalidImage, RetraceError
from retrace.metrics import clip_score, clip_scores, edit_report, self_similarity, spatial_tokens, structure_distance
from retrace.models.clip.model import ImageTextModel
from retrace.models.pebble.scenes import Scene

COLOURS = {"red": (1.0, 0.0, 0.0), "grey": (1.0, 1.0, 1.0)}


class MeanColour(ImageTextModel):
    """Pictures become the direction of their mean colour, words that of their colour, and 4x4 pixels are a token."""

    mean = (0.2, 0.4, 0.6)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return torch.nn.functional.normalize(images.mean(dim=(1, 2)), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([COLOURS[text] for text in texts]), dim=-1)

    def visual_tokens(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 4).flatten(2).transpose(1, 2)


def red_on_green() -> tuple[torch.Tensor, torch.Tensor]:
    """A green picture [1,32,32,3] with a red rectangle of 4x8 pixels, and the rectangle [1,32,32]."""
    picture, region = torch.zeros(1, 32, 32, 3), torch.zeros(1, 32, 32, dtype=torch.bool)
    region[:, 8:12, 16:24] = True
    picture[..., 1] = 1
    picture[region] = torch.tensor([1.0, 0.0, 0.0])
    return picture, region


def test_clip_score_closed_forms() -> None:
    picture, region = red_on_green()
    clip = MeanColour()
    scores = clip_scores(picture, "red", clip, region)
    mean = torch.tensor([32 * 1.0, (1024 - 32) * 1.0, 0])  # of the whole, times 1024
    assert scores.whole.item() == pytest.approx((mean[0] / mean.norm()).item(), rel=1e-6)
    assert scores.inside.item() == pytest.approx(1)  # black adds nothing
    assert scores.box.item() == pytest.approx(1)
    rest = 32 * torch.tensor(clip.mean) + torch.tensor([0, 1024.0 - 32, 0])
    assert scores.outside.item() == pytest.approx((rest[0] / rest.norm()).item(), rel=1e-6)
    assert [tuple(seen.shape[1:3]) for seen in clip.seen] == [(32, 32), (32, 32), (32, 32), (4, 8)]
    assert clip_score(picture, "red", clip).tolist() == scores.whole.tolist()
    both = clip_score(torch.cat([picture, torch.ones_like(picture)]), "grey", clip)
    assert both[1].item() == pytest.approx(1) and both.shape == (2,)


def test_clip_scores_where_there_is_no_such_part() -> None:
    picture, region = red_on_green()
    batch = torch.cat([torch.zeros_like(region), region, torch.ones_like(region)])
    scores = clip_scores(picture.expand(3, -1, -1, -1), "red", MeanColour(), batch)
    for part, absent in (("whole", []), ("inside", [0]), ("box", [0]), ("outside", [2])):
        assert torch.isnan(getattr(scores, part)).nonzero().flatten().tolist() == absent, part
    assert scores.inside[2] == scores.box[2] == scores.whole[0] == scores.outside[0]
    with pytest.raises(InvalidImage, match="mask > 0"):
        clip_scores(picture, "red", MeanColour(), region.float())
    with pytest.raises(InvalidImage, match="image: got"):
        clip_score(picture[0], "red", MeanColour())


def test_structure_distance_known_values() -> None:
    tokens = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(1))
    assert structure_distance(tokens, tokens).abs().max() == 0
    similarity = self_similarity(tokens)
    assert similarity.shape == (2, 9, 9) and torch.allclose(similarity.diagonal(dim1=1, dim2=2), torch.ones(2, 9))
    # Only angles between the tokens of one picture count: not their lengths, nor a rotation of all of them.
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2))).Q
    lengths = torch.arange(1.0, 10)[:, None]
    assert structure_distance(tokens @ rotation * lengths, tokens).max() < 1e-12
    # The same permutation of both changes nothing; of one of them it does.
    order = torch.tensor([3, 0, 1, 2, 8, 7, 6, 5, 4])
    expected = structure_distance(tokens, other)
    assert expected.shape == (2,) and expected.dtype == torch.float64 and (expected > 0.1).all()
    assert structure_distance(tokens[:, order], other[:, order]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert (structure_distance(tokens[:, order], tokens) > 0.1).all()
    # Four tokens that are all different against four that are all alike: 12 of 16 cosines differ by 1.
    assert structure_distance(torch.eye(4)[None], torch.ones(1, 4, 4)).item() == pytest.approx(12 / 16)
    assert structure_distance(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)).item() == 0
    with pytest.raises(InvalidImage, match="same N"):
        structure_distance(tokens, other[:, :8])


def test_report_with_clip() -> None:
    picture, region = red_on_green()
    source = torch.zeros_like(picture)
    source[..., 1] = 1
    clip = MeanColour()
    both = torch.cat([picture, source])
    report = edit_report(both, source, region.float(), clip=clip, prompt=" red ", tokens=clip.visual_tokens)
    edit, unchanged = report.images
    assert edit.inside.clip == pytest.approx(1) and edit.clip_box == pytest.approx(1)
    assert unchanged.inside.clip == unchanged.clip_box == 0
    assert report.mean.inside.clip == pytest.approx(0.5) and report.mean.clip_box == pytest.approx(0.5)
    # Two of 64 tokens are turned by a right angle: 2 * 2 * 62 of 64 * 64 cosines fall from 1 to 0.
    assert edit.structure_distance == pytest.approx(2 * 2 * 62 / 64**2) and unchanged.structure_distance == 0
    head, *rows = report.text().splitlines()[:4]
    assert head.split()[-1] == "CLIP" and {len(row) for row in rows} == {len(head)}
    assert "CLIP score of the box around the mask: 0.5000" in report.text()
    assert "structure distance: 3.027e-02" in report.text()
    content = json.loads(report.json())
    assert content["images"][0]["overall"]["clip"] == edit.overall.clip and content["clip_box"] == report.mean.clip_box

    silent = edit_report(both, source, region.float(), clip=clip, tokens=None)
    assert silent.mean.overall.clip is None and silent.mean.clip_box is None and silent.mean.structure_distance is None
    assert "CLIP" not in silent.text() and "structure" not in silent.text()
    full = edit_report(both, source, torch.ones(1, 32, 32), clip=clip, prompt="red")
    assert full.mean.outside.clip is None and full.mean.inside.clip == full.mean.overall.clip
    with pytest.raises(RetraceError, match=r"prompt: got words.*image-text model"):
        edit_report(both, source, region.float(), prompt="red")


def test_pebbles_clip_tells_a_good_edit_from_none() -> None:
    pytest.importorskip("open_clip")
    from retrace.models.clip.model import load_image_text_model
    from retrace.models.pebble.scenes import instance_masks, render, sample_scene, scene_rng

    scene = sample_scene(scene_rng("heldout", 3), 1)
    other = next(s for s in (sample_scene(scene_rng("heldout", i), 1) for i in range(4, 40)) if _differs(s, scene))
    source, target = (render(s).movedim(0, -1)[None] for s in (scene, other))
    clip = load_image_text_model()
    mask = torch.maximum(instance_masks(scene)[:1], instance_masks(other)[:1])
    report = edit_report(
        torch.cat([target, source]), source, mask, clip=clip, prompt=other.caption(), tokens=clip.visual_tokens
    )
    edit, none = report.images
    assert edit.overall.clip is not None and none.overall.clip is not None
    assert edit.overall.clip > none.overall.clip + 0.1
    assert none.structure_distance == 0 and 0 < (edit.structure_distance or 0) < 1


def _differs(one: Scene, other: Scene) -> bool:
    return one.objects[0].colour != other.objects[0].colour and one.objects[0].shape != other.objects[0].shape


@pytest.mark.parametrize(("tokens", "spatial"), [(257, 256), (50, 49), (729, 729), (201, 196), (1370, 1369)])
def test_spatial_tokens_come_after_class_and_registers(tokens: int, spatial: int) -> None:
    """CLIP, CLIP B/32, SigLIP, DINOv3 with four registers, DINOv2 at 518 pixels."""
    every = torch.arange(tokens)[None, :, None]
    assert spatial_tokens(every).flatten().tolist() == list(range(tokens - spatial, tokens))
