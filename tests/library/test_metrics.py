"""Metrics against closed forms and scikit-image, regions, LPIPS without a download, CLIP scores, and the report."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch

from retrace.errors import InvalidFile, InvalidImage, MissingPackage, RetraceError
from retrace.metrics import (
    PSNR_CAP,
    changed_pixels,
    clip_score,
    clip_scores,
    edit_report,
    eight_bit_difference,
    find_backbone,
    load_lpips,
    lpips_distance,
    mse,
    psnr,
    self_similarity,
    spatial_tokens,
    ssim,
    ssim_map,
    structure_distance,
)


def waves() -> tuple[torch.Tensor, torch.Tensor]:
    """Two deterministic pictures [1,24,32,3] that share structure."""
    y, x = torch.meshgrid(torch.arange(24.0).double(), torch.arange(32.0).double(), indexing="ij")
    first = torch.stack([0.5 + 0.5 * torch.sin(x / 3 + y / 5), (x * y % 17) / 16, ((x - y) % 11) / 10], -1)
    second = (first * 0.8 + 0.1 + 0.1 * torch.cos(x * 0.9)[..., None]).clamp(0, 1)
    return first[None], second[None]


def test_against_scikit_image():
    # scikit-image 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1, channel_axis=-1, full=True), its map averaged over [8:16, 10:20]; peak_signal_noise_ratio.
    first, second = waves()
    region = torch.zeros(1, 24, 32, dtype=torch.bool)
    region[:, 8:16, 10:20] = True
    assert ssim(first, second).item() == pytest.approx(0.91311122011041, abs=1e-7)
    assert ssim(first, second, region).item() == pytest.approx(0.9196932993145539, abs=1e-7)
    assert psnr(first, second).item() == pytest.approx(20.21243138996884, abs=1e-9)
    assert mse(first, second).item() == pytest.approx(0.009522628920675178, abs=1e-12)


def test_closed_forms_on_flat_pictures():
    a, b = torch.full((1, 16, 16, 3), 0.25).double(), torch.full((1, 16, 16, 3), 0.75).double()
    c1 = 0.01**2
    assert mse(a, b).item() == pytest.approx(0.25)
    assert psnr(a, b).item() == pytest.approx(6.020599913279624)
    assert ssim(a, b).item() == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1))
    assert eight_bit_difference(a, b).unique().tolist() == [127]  # 0.25 and 0.75 round to 64 and 191


def test_identical_pictures():
    image = waves()[0]
    black = torch.zeros_like(image)
    for one in (image, black):
        assert psnr(one, one).item() == PSNR_CAP
        assert ssim(one, one).item() == pytest.approx(1, abs=1e-12)
        assert mse(one, one).item() == 0


def test_values_are_per_image_and_one_target_serves_all():
    first, second = waves()
    both = psnr(torch.cat([first, second]), first)
    assert both.tolist() == pytest.approx([PSNR_CAP, 20.21243138996884])


def test_regions():
    target = torch.full((1, 16, 16, 3), 0.5)
    image = target.clone()
    image[:, :, :4] += 0.1
    left = torch.zeros(1, 16, 16, dtype=torch.bool)
    left[:, :, :4] = True
    assert mse(image, target, left).item() == pytest.approx(0.01, rel=1e-5)
    assert mse(image, target, ~left).item() == 0
    assert psnr(image, target, left).item() == pytest.approx(20, abs=1e-4)
    assert psnr(image, target, ~left).item() == PSNR_CAP
    assert changed_pixels(image, target).item() == 0.25
    assert changed_pixels(image, target, ~left).item() == 0
    assert ssim(image, target, left) < ssim(image, target, ~left) < 1  # windows across the edge see the change
    everything = torch.ones_like(left)
    assert ssim(image, target, everything).item() == pytest.approx(ssim_map(image, target).mean().item())
    assert torch.isnan(mse(image, target, ~everything)).all()


def test_changes_below_half_a_level_do_not_count():
    image = torch.full((1, 16, 16, 3), 100 / 255)
    assert changed_pixels(image + 0.4 / 255, image).item() == 0
    assert eight_bit_difference(image + 0.6 / 255, image).max() == 1


def test_metric_errors():
    image = torch.rand(1, 16, 16, 3)
    with pytest.raises(InvalidImage, match="at least 11x11"):
        ssim(image[:, :10], image[:, :10])
    with pytest.raises(InvalidImage, match="Resize"):
        psnr(image, image[:, :12])
    with pytest.raises(InvalidImage, match="mask > 0"):
        mse(image, image, torch.ones(1, 16, 16))


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.full((2, 32, 32, 3), 128 / 255)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    edited = source.clone()
    edited[:, 8:24, 8:24] += 0.1
    edited[1, 0, :16, 1] += 10 / 255
    return edited, source, mask


def test_report_of_a_batch():
    report = edit_report(*example())
    clean, leaky = report.images
    assert clean.outside.psnr == PSNR_CAP and clean.max_difference_outside == 0 and clean.changed_outside == 0
    assert clean.inside.psnr == pytest.approx(20, abs=1e-4) and clean.inside.mse == pytest.approx(0.01, rel=1e-4)
    assert leaky.max_difference_outside == 10 and leaky.changed_outside == pytest.approx(16 / 768)
    assert report.max_difference_outside == 10 and report.mask_area == 0.25
    assert report.overall.mse == pytest.approx((clean.overall.mse + leaky.overall.mse) / 2)
    assert report.overall.lpips is None
    text = report.text()
    assert "mask area: 25.0%" in text and "at most 10 of 255" in text
    assert "  1: inside 20.00 dB, outside >=100 dB, identical in 8 bits" in text
    assert "LPIPS" not in text


def test_the_report_table_lines_up():
    head, *rows = edit_report(*example()).text().splitlines()[:4]
    assert head.split() == ["region", "PSNR", "dB", "SSIM", "MSE"]
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_json_is_valid_for_empty_and_full_masks_and_identical_pictures(value):
    source = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    report = edit_report(source, source, torch.full((1, 16, 16), value))

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(report.json(), parse_constant=refuse)
    assert content == json.loads(json.dumps(report.to_dict()))
    gone, there = ("inside", "outside") if value == 0 else ("outside", "inside")
    assert content[gone] == {"psnr": None, "ssim": None, "mse": None, "lpips": None, "clip": None}
    assert content[there]["psnr"] == content["psnr_cap_db"] == 100
    assert content["mask_area"] == value and len(content["images"]) == 1
    assert content["max_difference_outside"] == (0 if value == 0 else None)
    expected = "identical in 8 bits" if value == 0 else "there is none"
    assert expected in report.text()


def test_report_errors():
    edited, source, mask = example()
    with pytest.raises(InvalidImage, match=r"edited image: got.*Split Image with Alpha"):
        edit_report(torch.rand(2, 32, 32, 4), source, mask)
    with pytest.raises(InvalidImage, match=r"mask: got.*Resize"):
        edit_report(edited, source, mask[:, :16])
    with pytest.raises(InvalidImage, match="source image: got 3"):
        edit_report(edited, torch.rand(3, 32, 32, 3), mask)


# LPIPS: the real ImageNet weights are not there in a test, so a seeded random backbone stands in for them. It proves
# the loading and the regions; the package's own arithmetic is not ours to test.


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    pytest.importorskip("lpips")
    shapes = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for index, (out, into, side) in zip((0, 3, 6, 8, 10), shapes, strict=True):
        scale = (2 / (into * side * side)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(out, into, side, side, generator=generator) * scale
        weights[f"features.{index}.bias"] = torch.zeros(out)
    file = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(weights, file)
    return file


def test_missing_lpips_weights_are_named_and_not_downloaded(no_network, monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InvalidFile) as caught:
        edit_report(*example(), lpips=True)
    text = str(caught.value)
    assert "'alexnet-owt-7be5be79.pth'" in text and str(tmp_path / "checkpoints") in text
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in text and "turn LPIPS off" in text
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingPackage, match=r"needed to measure LPIPS.*pip install lpips"):
        load_lpips()


def test_the_cache_of_torch_hub_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    file.touch()
    assert find_backbone("vgg") == file
    with pytest.raises(RetraceError, match="'resnet'"):
        find_backbone("resnet")  # type: ignore[arg-type]


def test_damaged_and_foreign_weights(no_network, tmp_path):
    pytest.importorskip("lpips")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(InvalidFile, match=r"'broken.pth' cannot be read"):
        load_lpips("alex", broken)
    foreign = tmp_path / "foreign.pth"
    torch.save({"unet.weight": torch.zeros(1)}, foreign)
    with pytest.raises(InvalidFile, match="10 of 10 weights are missing"):
        load_lpips("alex", foreign)
    torch.save(
        {f"features.{i}.{kind}": torch.zeros(1) for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")}, foreign
    )
    with pytest.raises(InvalidFile, match="does not fit"):
        load_lpips("alex", foreign)


def test_lpips_scores_and_regions(no_network, backbone_file):
    state = torch.random.get_rng_state()
    model = load_lpips("alex", backbone_file)
    assert torch.equal(torch.random.get_rng_state(), state)
    stored = torch.load(backbone_file, weights_only=True)
    assert torch.equal(model.get_submodule("net").state_dict()["slice2.3.weight"], stored["features.3.weight"])

    edited, source, mask = example()
    inside = mask > 0
    whole = lpips_distance(edited, source, model)
    assert whole.shape == (2,) and (whole > 0).all()
    assert lpips_distance(source, source, model).abs().max() == 0
    assert lpips_distance(edited, source, model, ~inside)[0] == 0  # the first changed nothing there
    assert lpips_distance(edited, source, model, ~inside)[1] > 0
    assert lpips_distance(edited, source, model, inside)[0] == pytest.approx(whole[0].item())
    with pytest.raises(InvalidImage, match="at least 32x32"):
        lpips_distance(edited[:, :16], source[:, :16], model)

    report = edit_report(edited, source, mask, lpips=True, lpips_path=backbone_file)
    assert report.images[0].overall.lpips == pytest.approx(whole[0].item())
    assert report.images[0].outside.lpips == 0 and "LPIPS" in report.text()
    full = edit_report(edited, source, torch.ones_like(mask), lpips=model)
    assert full.outside.lpips is None


# CLIP score: a stand-in whose vectors are mean colours gives every value a closed form.


COLOURS = {"red": (1.0, 0.0, 0.0), "grey": (1.0, 1.0, 1.0)}


class MeanColour:
    """Pictures become the direction of their mean colour, words that of their colour, and 4x4 pixels are a token."""

    mean = (0.2, 0.4, 0.6)

    def __init__(self):
        self.seen = []

    def encode_images(self, images):
        self.seen.append(images)
        return torch.nn.functional.normalize(images.mean(dim=(1, 2)), dim=-1)

    def encode_texts(self, texts):
        return torch.nn.functional.normalize(torch.tensor([COLOURS[text] for text in texts]), dim=-1)

    def visual_tokens(self, images):
        return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 4).flatten(2).transpose(1, 2)


def red_on_green() -> tuple[torch.Tensor, torch.Tensor]:
    """A green picture [1,32,32,3] with a red rectangle of 4x8 pixels, and the rectangle [1,32,32]."""
    picture, region = torch.zeros(1, 32, 32, 3), torch.zeros(1, 32, 32, dtype=torch.bool)
    region[:, 8:12, 16:24] = True
    picture[..., 1] = 1
    picture[region] = torch.tensor([1.0, 0.0, 0.0])
    return picture, region


def test_clip_score_closed_forms():
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


def test_clip_scores_where_there_is_no_such_part():
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


def test_structure_distance_known_values():
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


def test_report_with_clip():
    picture, region = red_on_green()
    source = torch.zeros_like(picture)
    source[..., 1] = 1
    clip = MeanColour()
    both = torch.cat([picture, source])
    report = edit_report(both, source, region.float(), clip=clip, prompt=" red ", tokens=clip.visual_tokens)
    edit, unchanged = report.images
    assert edit.inside.clip == pytest.approx(1) and edit.clip_box == pytest.approx(1)
    assert unchanged.inside.clip == unchanged.clip_box == 0
    assert report.inside.clip == pytest.approx(0.5) and report.clip_box == pytest.approx(0.5)
    # Two of 64 tokens are turned by a right angle: 2 * 2 * 62 of 64 * 64 cosines fall from 1 to 0.
    assert edit.structure_distance == pytest.approx(2 * 2 * 62 / 64**2) and unchanged.structure_distance == 0
    head, *rows = report.text().splitlines()[:4]
    assert head.split()[-1] == "CLIP" and {len(row) for row in rows} == {len(head)}
    assert "CLIP score of the box around the mask: 0.5000" in report.text()
    assert "structure distance: 3.027e-02" in report.text()
    content = json.loads(report.json())
    assert content["images"][0]["overall"]["clip"] == edit.overall.clip and content["clip_box"] == report.clip_box

    silent = edit_report(both, source, region.float(), clip=clip, tokens=None)
    assert silent.overall.clip is None and silent.clip_box is None and silent.structure_distance is None
    assert "CLIP" not in silent.text() and "structure" not in silent.text()
    full = edit_report(both, source, torch.ones(1, 32, 32), clip=clip, prompt="red")
    assert full.outside.clip is None and full.inside.clip == full.overall.clip
    with pytest.raises(RetraceError, match=r"prompt: got words.*Load CLIP"):
        edit_report(both, source, region.float(), prompt="red")


def test_pebbles_clip_tells_a_good_edit_from_none():
    pytest.importorskip("open_clip")
    from retrace.clip import load_image_text_model
    from retrace.pebble.scenes import instance_masks, render, sample_scene, scene_rng

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


def _differs(one, other) -> bool:
    return one.objects[0].colour != other.objects[0].colour and one.objects[0].shape != other.objects[0].shape


@pytest.mark.parametrize(("tokens", "spatial"), [(257, 256), (50, 49), (729, 729), (201, 196), (1370, 1369)])
def test_spatial_tokens_come_after_class_and_registers(tokens, spatial):
    """CLIP, CLIP B/32, SigLIP, DINOv3 with four registers, DINOv2 at 518 pixels."""
    every = torch.arange(tokens)[None, :, None]
    assert spatial_tokens(every).flatten().tolist() == list(range(tokens - spatial, tokens))
