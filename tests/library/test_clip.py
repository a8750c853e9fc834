"""Image-text models: Pebble's CLIP on its scenes, preprocessing, files of weights, and nothing from the network."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retrace.core.errors import InvalidFile, InvalidImage, MissingPackage, UnsupportedModel
from retrace.models.clip.files import find_weights
from retrace.models.clip.model import ARCHITECTURES, KNOWN, PEBBLE, ImageTextModel, load_image_text_model
from retrace.models.pebble.clip import MEAN, STD
from retrace.models.pebble.scenes import heldout, render_batch

open_clip = pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
LONG = "a red circle on grass and a very long story about it, " * 50
STRANGE = "zxqv \u30ab\u30e1\u30e9 \U0001f993 \ud83d"


def no_words(texts: list[str]) -> torch.Tensor:
    raise AssertionError("this test has no words")


@pytest.fixture(scope="module")
def pebble() -> ImageTextModel:
    with torch.inference_mode():  # as ComfyUI builds it
        return load_image_text_model()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An open_clip model of an architecture 'tiny', small enough to build in a test."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**TINY)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def images(count: int, height: int = 128, width: int = 128) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


# -- the model


def test_pebbles_clip_knows_its_scenes(pebble: ImageTextModel) -> None:
    scenes = heldout(8, objects=1)
    pictures = pebble.encode_images(render_batch(scenes).movedim(1, -1))
    words = pebble.encode_texts([scene.caption() for scene in scenes])
    assert pictures.shape == words.shape == (8, 64) and pebble.size == (128, 128)
    assert torch.allclose(pictures.norm(dim=-1), torch.ones(8), atol=1e-5)
    assert torch.allclose(words.norm(dim=-1), torch.ones(8), atol=1e-5)
    assert ((pictures @ words.T).argmax(dim=1) == torch.arange(8)).sum() >= 7


@pytest.mark.parametrize("text", ["", LONG, STRANGE])
def test_any_text_is_encoded(pebble: ImageTextModel, text: str) -> None:
    vector = pebble.encode_texts([text])
    assert vector.norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(vector, pebble.encode_texts([text + " and on"]), atol=1e-5) == (text == LONG)


def test_preprocessing(pebble: ImageTextModel) -> None:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    native = images(2)
    assert torch.allclose(pebble.preprocess(native), (native.movedim(-1, 1) - mean) / std, atol=1e-6)
    wide = torch.full((1, 50, 300, 3), 0.25)
    assert torch.allclose(pebble.preprocess(wide), ((0.25 - mean) / std).expand(1, 3, 128, 128), atol=1e-4)
    # Antialiased: a checkerboard of pixels becomes flat grey, and no edge leaves 0..1.
    board = (torch.arange(512)[:, None] + torch.arange(512)) % 2
    grey = pebble.preprocess(board[None, :, :, None].expand(1, 512, 512, 3).float()) * std + mean
    assert grey[:, :, 4:-4, 4:-4].sub(0.5).abs().max() < 0.01
    edge = pebble.preprocess((images(1, 96, 96) > 0.5).float()) * std + mean
    assert edge.min() >= -1e-6 and edge.max() <= 1 + 1e-6
    with pytest.raises(InvalidImage, match=r"\[B, H, W, 3\] is needed"):
        pebble.encode_images(native.movedim(-1, 1))


def test_every_part_of_a_wide_picture_counts(pebble: ImageTextModel) -> None:
    picture = images(1, 64, 192)
    changed = picture.clone()
    changed[:, :, :24] = 0
    assert (pebble.encode_images(picture) @ pebble.encode_images(changed).T).item() < 0.9999


def test_gradients_reach_a_picture_although_it_was_loaded_in_inference_mode(pebble: ImageTextModel) -> None:
    picture = images(1).requires_grad_()
    (pebble.encode_images(picture) @ pebble.encode_texts(["a red circle"]).T).sum().backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.is_inference() for p in pebble.model.parameters())


def test_moving_there_and_back(pebble: ImageTextModel) -> None:
    with torch.inference_mode(), pebble.on("meta") as moved:  # the one other device that every machine has
        assert moved.device.type == "meta"
        assert moved.encode_images(images(1)).shape == (1, 64)
        pebble.model = load_image_text_model().model  # what was on meta has no values to come back with
    assert pebble.device.type == "cpu" and pebble.bytes > 1_000_000


def test_visual_tokens(pebble: ImageTextModel, tiny: Any) -> None:
    assert pebble.has_tokens and pebble.visual_tokens(images(2)).shape == (2, 64, 128)
    clip = ImageTextModel(tiny.eval(), no_words, "tiny")
    with torch.no_grad():
        tokens = clip.visual_tokens(images(1, 32, 32))
        # Without the class token, what is left goes through the last block with it and gives the known features.
        every = tiny.visual.forward_intermediates(clip.preprocess(images(1, 32, 32)), indices=[1], output_fmt="NLC")
    assert torch.allclose(tokens, every["image_intermediates"][0], atol=1e-5)
    assert not tiny.visual.transformer.resblocks[-2]._forward_hooks
    tiny.visual = torch.nn.Identity()
    tiny.visual.image_size = 32
    convolutional = ImageTextModel(tiny, no_words, "RN50")
    assert not convolutional.has_tokens
    with pytest.raises(UnsupportedModel, match=r"'RN50' gives no tokens.*Identity.*CLIP Vision"):
        convolutional.visual_tokens(images(1))


# -- files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files_of_open_clip_are_loaded(no_network: None, tiny: Any, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"mine{suffix}"
    half = {name: value.half() for name, value in tiny.state_dict().items()}
    if suffix == ".safetensors":
        save_file(half, file)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in half.items()}, "epoch": 3}, file)
    state = torch.random.get_rng_state()
    clip = load_image_text_model(file, architecture="tiny")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert clip.name == file.name and clip.size == (32, 32)
    for name, value in clip.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, half[name].float()), name
    assert clip.encode_texts(["a word"]).shape == clip.encode_images(images(1)).shape == (1, 16)


def test_known_models_are_found_in_a_folder(
    no_network: None, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"hf_hub": "someone/tiny/", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda architecture, tag: facts if tag == "tag" else {})
    torch.save(tiny.state_dict(), tmp_path / "tiny-tag.pt")
    clip = load_image_text_model("tiny/tag", folders=[tmp_path / "none", tmp_path])
    assert clip.name == "tiny/tag" and clip.mean == (0.5,) * 3 and clip.std == (0.25,) * 3
    act = clip.model.visual.transformer.resblocks[0].mlp.gelu
    assert type(act).__name__ == "QuickGELU"
    with pytest.raises(UnsupportedModel, match=r"no pretrained model 'tiny/other'"):
        load_image_text_model("tiny/other")


def test_what_huggingface_has_already_downloaded_is_used(no_network: None, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    (snapshot / "open_clip_pytorch_model.bin").touch()
    facts = {"hf_hub": "someone/tiny/"}
    assert find_weights("tiny", "tag", facts) == snapshot / "open_clip_pytorch_model.bin"
    with pytest.raises(InvalidFile, match=r"not in Hugging Face's cache.*resolve/main/x.pt and name that file"):
        find_weights("tiny", "tag", {"hf_hub": "someone/tiny/x.pt"})


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_known_model_is_named_and_not_downloaded(no_network: None, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        load_image_text_model(name, folders=[tmp_path, tmp_path / "clip_vision"])
    text = str(caught.value)
    assert f"'{name.replace('/', '-')}.safetensors' in the folder '{tmp_path}'" in text
    assert "https://huggingface.co/" in text and "/resolve/main/open_clip_model.safetensors" in text
    assert list(tmp_path.iterdir()) == []


def test_the_architectures_on_offer_exist() -> None:
    assert set(ARCHITECTURES) <= set(open_clip.list_models())
    for name in KNOWN:
        architecture, tag = name.split("/")
        facts = open_clip.get_pretrained_cfg(architecture, tag)
        assert facts["hf_hub"].endswith("/") and facts.get("quick_gelu", False) == (tag == "openai")


def test_what_cannot_be_loaded(no_network: None, tiny: Any, tmp_path: Path) -> None:
    def load(content: Any, **options: Any) -> None:
        file = tmp_path / "file.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        load_image_text_model(file, architecture="tiny")

    state = tiny.state_dict()
    with pytest.raises(InvalidFile, match=r"no file 'absent.pt' in the folder"):
        load_image_text_model(tmp_path / "absent.pt")
    with pytest.raises(InvalidFile, match=r"'file.pt' cannot be read.*\.safetensors"):
        load(b"PK\x03\x04 truncated")
    with pytest.raises(InvalidFile, match=r"cannot be read"):
        load({"a": Path("code")})  # only weights are unpickled
    with pytest.raises(
        InvalidFile, match=r"weights are missing, 'positional_embedding' first\. It holds only the text"
    ):
        load({"text_model.embeddings.position_ids": torch.zeros(1)})
    with pytest.raises(InvalidFile, match=r"in the form of transformers"):
        load({"text_model.a": torch.zeros(1), "vision_model.a": torch.zeros(1)})
    with pytest.raises(InvalidFile, match=r"'visual.class_embedding' is \[48\] instead of \[32\].*Choose the arch"):
        load(state | {"visual.class_embedding": torch.zeros(48)})
    with pytest.raises(InvalidFile, match=r"'visual.transformer.resblocks.3.x' has no place"):
        load(state | {"visual.transformer.resblocks.3.x": torch.zeros(1)})
    load(state | {"input_resolution": torch.tensor(32), "logit_scale": state["logit_scale"][None]})


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("ViT-Z-99", "no architecture 'ViT-Z-99'"),
        ("ViT-B-16-SigLIP", "not a plain CLIP"),
        ("coca_ViT-B-32", "not a plain CLIP"),
    ],
)
def test_architectures_that_one_file_does_not_make(tmp_path: Path, architecture: str, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_image_text_model(tmp_path / "any.pt", architecture=architecture)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name in (PEBBLE, KNOWN[0]):
        with pytest.raises(MissingPackage, match=r"pip install open_clip_torch"):
            load_image_text_model(name)
