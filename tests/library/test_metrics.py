"""Metrics against closed forms and scikit-image, regions, LPIPS without a download, and the report."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks.edit_cost import counted
from benchmarks.seam import border_gradient
from retrace.core.errors import InvalidFile, InvalidImage, MissingPackage, RetraceError
from retrace.metrics import (
    PSNR_CAP,
    changed_pixels,
    edit_report,
    eight_bit_difference,
    find_backbone,
    load_lpips,
    lpips_distance,
    mse,
    psnr,
    ssim,
    ssim_map,
)


def waves() -> tuple[torch.Tensor, torch.Tensor]:
    """Two deterministic pictures [1,24,32,3] that share structure."""
    y, x = torch.meshgrid(torch.arange(24.0).double(), torch.arange(32.0).double(), indexing="ij")
    first = torch.stack([0.5 + 0.5 * torch.sin(x / 3 + y / 5), (x * y % 17) / 16, ((x - y) % 11) / 10], -1)
    second = (first * 0.8 + 0.1 + 0.1 * torch.cos(x * 0.9)[..., None]).clamp(0, 1)
    return first[None], second[None]


def test_against_scikit_image() -> None:
    # scikit-image 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1, channel_axis=-1, full=True), its map averaged over [8:16, 10:20]; peak_signal_noise_ratio.
    first, second = waves()
    region = torch.zeros(1, 24, 32, dtype=torch.bool)
    region[:, 8:16, 10:20] = True
    assert ssim(first, second).item() == pytest.approx(0.91311122011041, abs=1e-7)
    assert ssim(first, second, region).item() == pytest.approx(0.9196932993145539, abs=1e-7)
    assert psnr(first, second).item() == pytest.approx(20.21243138996884, abs=1e-9)
    assert mse(first, second).item() == pytest.approx(0.009522628920675178, abs=1e-12)


def test_border_gradient_is_the_mean_step_across_the_border() -> None:
    image = torch.zeros(2, 8, 10, 3)
    image[0, 2:5, 3:7] = torch.tensor([0.3, 0.0, 0.4])  # a step of 0.5 all around
    image[1, :, :, 0] = torch.arange(10) / 100  # a ramp of 0.01 to the right, none downwards
    mask = torch.zeros(1, 8, 10)
    mask[:, 2:5, 3:7] = 0.1  # soft values belong to the mask
    # 2 * 3 pairs in rows, 2 * 4 in columns
    assert border_gradient(image, mask).tolist() == pytest.approx([0.5, 0.01 * 6 / 14], abs=1e-6)
    mask[:, :, :7] = 1  # the picture's own border is none of the mask
    assert border_gradient(image, mask).tolist() == pytest.approx([0.5 * 3 / 8, 0.01], abs=1e-6)
    assert border_gradient(image, torch.ones(1, 8, 10)).isnan().all()


def test_closed_forms_on_flat_pictures() -> None:
    a, b = torch.full((1, 16, 16, 3), 0.25).double(), torch.full((1, 16, 16, 3), 0.75).double()
    c1 = 0.01**2
    assert mse(a, b).item() == pytest.approx(0.25)
    assert psnr(a, b).item() == pytest.approx(6.020599913279624)
    assert ssim(a, b).item() == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1))
    assert eight_bit_difference(a, b).unique().tolist() == [127]  # 0.25 and 0.75 round to 64 and 191


def test_identical_pictures() -> None:
    image = waves()[0]
    black = torch.zeros_like(image)
    for one in (image, black):
        assert psnr(one, one).item() == PSNR_CAP
        assert ssim(one, one).item() == pytest.approx(1, abs=1e-12)
        assert mse(one, one).item() == 0


def test_values_are_per_image_and_one_target_serves_all() -> None:
    first, second = waves()
    both = psnr(torch.cat([first, second]), first)
    assert both.tolist() == pytest.approx([PSNR_CAP, 20.21243138996884])


def test_regions() -> None:
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


def test_changes_below_half_a_level_do_not_count() -> None:
    image = torch.full((1, 16, 16, 3), 100 / 255)
    assert changed_pixels(image + 0.4 / 255, image).item() == 0
    assert eight_bit_difference(image + 0.6 / 255, image).max() == 1


def test_metric_errors() -> None:
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


def test_report_of_a_batch() -> None:
    report = edit_report(*example())
    clean, leaky = report.images
    assert clean.outside.psnr == PSNR_CAP and clean.max_difference_outside == 0 and clean.changed_outside == 0
    assert clean.inside.psnr == pytest.approx(20, abs=1e-4) and clean.inside.mse == pytest.approx(0.01, rel=1e-4)
    assert leaky.max_difference_outside == 10 and leaky.changed_outside == pytest.approx(16 / 768)
    assert report.mean.max_difference_outside == 10 and report.mean.mask_area == 0.25
    assert clean.overall.mse is not None and leaky.overall.mse is not None
    assert report.mean.overall.mse == pytest.approx((clean.overall.mse + leaky.overall.mse) / 2)
    assert report.mean.overall.lpips is None
    text = report.text()
    assert "mask area: 25.0%" in text and "at most 10 of 255" in text
    assert "  1: inside 20.00 dB, outside >=100 dB, identical in 8 bits" in text
    assert "LPIPS" not in text


def test_a_report_checks_its_inputs_once_and_computes_each_map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kornia = pytest.importorskip("kornia.metrics")
    computed = Mock(wraps=kornia.ssim)
    monkeypatch.setattr(kornia, "ssim", computed)
    with counted() as calls:
        edit_report(*example())
    assert calls == {"check_image": 2, "check_same_size": 1, "check_mask": 1, "match_batch": 2}
    assert computed.call_count == 1


def test_the_report_table_lines_up() -> None:
    head, *rows = edit_report(*example()).text().splitlines()[:4]
    assert head.split() == ["region", "PSNR", "dB", "SSIM", "MSE"]
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_json_is_valid_for_empty_and_full_masks_and_identical_pictures(value: float) -> None:
    source = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    report = edit_report(source, source, torch.full((1, 16, 16), value))

    def refuse(name: str) -> None:
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


def test_report_errors() -> None:
    edited, source, mask = example()
    with pytest.raises(InvalidImage, match=r"edited image: got.*RGBA"):
        edit_report(torch.rand(2, 32, 32, 4), source, mask)
    with pytest.raises(InvalidImage, match=r"mask: got.*Resize"):
        edit_report(edited, source, mask[:, :16])
    with pytest.raises(InvalidImage, match="source image: got 3"):
        edit_report(edited, torch.rand(3, 32, 32, 3), mask)


# LPIPS: the real ImageNet weights are not there in a test, so a seeded random backbone stands in for them. It proves
# the loading and the regions; the package's own arithmetic is not ours to test.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_missing_lpips_weights_are_named_and_not_downloaded(
    no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InvalidFile) as caught:
        load_lpips()
    text = str(caught.value)
    assert "'alexnet-owt-7be5be79.pth'" in text and str(tmp_path / "checkpoints") in text
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in text and "turn LPIPS off" in text
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingPackage, match=r"needed to measure LPIPS.*pip install lpips"):
        load_lpips()


def test_the_cache_of_torch_hub_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    file.touch()
    assert find_backbone("vgg") == file
    with pytest.raises(RetraceError, match="'resnet'"):
        find_backbone("resnet")  # type: ignore[arg-type]


def test_damaged_and_foreign_weights(no_network: None, tmp_path: Path) -> None:
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


def test_lpips_scores_and_regions(no_network: None, backbone_file: Path) -> None:
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

    report = edit_report(edited, source, mask, lpips=model)
    assert report.images[0].overall.lpips == pytest.approx(whole[0].item())
    assert report.images[0].outside.lpips == 0 and "LPIPS" in report.text()
    full = edit_report(edited, source, torch.ones_like(mask), lpips=model)
    assert full.mean.outside.lpips is None
