from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from unclip.models import clip as clip_module
from unclip.models.clip import (
    ClipArchitectureConfig,
    ClipConfig,
    ClipDescription,
    ClipModel,
    Tokenizer,
    load_clip,
    tokenizer_for,
)

TINY = ClipArchitectureConfig(
    embed_dim=16,
    image_size=32,
    vision_layers=1,
    vision_width=32,
    vision_patch_size=8,
    vision_head_width=16,
    context_length=12,
    text_width=32,
    text_heads=2,
    text_layers=1,
)
CAPTIONS = ["a red circle", "two blue squares on a green field", ""]


@pytest.fixture(scope="module")
def model() -> ClipModel:
    torch.manual_seed(0)
    return TINY.build().eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def export(model: ClipModel, folder: Path, *, prefix: str) -> str:
    folder.mkdir()
    config = {"kind": "clip", "architecture": TINY.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + name: value for name, value in model.clip.state_dict().items()}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("prefix", ["", "clip."])
def test_exported_folder_is_the_same_clip(model: ClipModel, images: np.ndarray, tmp_path: Path, prefix: str) -> None:
    folder = export(model, tmp_path / "clip", prefix=prefix)
    loaded = load_clip(folder)
    torch.testing.assert_close(loaded.encode_image(images), model.encode_image(images))
    tokens = model.tokenize(CAPTIONS)
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))
    assert loaded.fingerprint == model.fingerprint
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer_for(folder).name is None


def test_fingerprint_sees_a_single_weight(model: ClipModel) -> None:
    other = TINY.build()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.clip.ln_final.bias[0] += 1e-6
    assert other.fingerprint != model.fingerprint


def test_incomplete_weights_are_refused(model: ClipModel, tmp_path: Path) -> None:
    folder = export(model, tmp_path / "clip", prefix="")
    weights = {name: value for name, value in model.clip.state_dict().items() if name != "text_projection"}
    save_file(weights, Path(folder) / "model.safetensors")
    with pytest.raises(RuntimeError, match="text_projection"):
        load_clip(folder)


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(model: ClipModel, images: np.ndarray) -> None:
    together = model.encode_image(images)
    assert together.shape == (3, 16)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_image(images[1:2]), together[1:2], rtol=1e-5, atol=1e-6)
    tokens = model.tokenize(CAPTIONS)
    texts = model.encode_text(tokens)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_text(tokens[2:]), texts[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("custom_text", [False, True])
def test_text_states_are_those_before_pooling(known_name: str, custom_text: bool) -> None:
    """Against open_clip's own output of all tokens, and the embedding that is made of the end-of-text token's."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    network = kind(**TINY.open_clip_config()).eval()
    clip = ClipModel(network, ClipDescription(TINY.open_clip_config()), Tokenizer(known_name))
    tokens = clip.tokenize(CAPTIONS)
    embeds, states = clip.encode_text_states(tokens)
    assert states.shape == (3, 12, clip.text_state_dim) == (3, 12, 32)
    torch.testing.assert_close(embeds, clip.encode_text(tokens))
    text = network.text if custom_text else network
    last = states[torch.arange(3), tokens.argmax(dim=1)]
    torch.testing.assert_close(functional.normalize(last @ text.text_projection, dim=1), embeds)
    if custom_text:
        text.output_tokens = True
        torch.testing.assert_close(states, text(tokens)[1])
        text.output_tokens = False
    # Of a state's token and those before it, nothing behind.
    changed = tokens.clone()
    changed[:, 3] = 7
    found = clip.encode_text_states(changed)[1]
    torch.testing.assert_close(found[:, :3], states[:, :3])
    assert (found[:, 3] - states[:, 3]).abs().amax() > 1e-3


def test_clips_without_fitting_text_states_say_so(model: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY.open_clip_config()
    config["text_cfg"]["embed_cls"] = True
    with_class = open_clip.CustomTextCLIP(**config)
    # A tokenizer that open_clip takes from a package which is not there.
    package = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: object()))
    monkeypatch.setitem(sys.modules, "transformers", package)
    for clip, reason in (
        (ClipModel(with_class, model.description, Tokenizer(None)), "no final norm over all tokens"),
        (ClipModel(model.clip, model.description, Tokenizer("roberta-ViT-B-32")), "not CLIP's byte-pair encoding"),
    ):
        with pytest.raises(ValueError, match=reason):
            _ = clip.text_state_dim
        with pytest.raises(ValueError, match=reason):
            clip.encode_text_states(model.tokenize(CAPTIONS))


def test_preprocessing_is_open_clips(model: ClipModel) -> None:
    """Against open_clip's own transform. It resizes with PIL in 8 bits, twice rounded; in floats PIL agrees closely."""
    smooth = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for size in (72, 32, 20):
        picture = Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC)
        expected = open_clip.image_transform(32, is_train=False)(picture)
        pixels = model.preprocess(np.asarray(picture)[None])[0]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=2.5 / 255 / 0.26)  # two and a half levels of 255
        red = Image.fromarray(np.asarray(picture)[..., 0].astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
        exact = (torch.tensor(np.asarray(red)).clamp(0, 255) / 255 - 0.48145466) / 0.26862954
        torch.testing.assert_close(pixels[0], exact, rtol=0, atol=1e-4)


def test_other_shapes_are_cropped_to_their_middle(model: ClipModel, images: np.ndarray) -> None:
    wide = np.concatenate([images[:1, :, :5], images[1:2], images[2:, :, :5]], axis=2)
    torch.testing.assert_close(model.preprocess(wide), model.preprocess(images[1:2]))
    torch.testing.assert_close(model.preprocess(wide.swapaxes(1, 2)), model.preprocess(images[1:2].swapaxes(1, 2)))


@pytest.mark.parametrize("bad", [np.zeros((1, 3, 32, 32), np.uint8), np.zeros((1, 32, 32, 3), np.float32)])
def test_other_pictures_are_refused(model: ClipModel, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(B, H, W, 3\)"):
        model.encode_image(bad)


def test_tokens_of_another_length_are_refused(model: ClipModel) -> None:
    with pytest.raises(ValueError, match=r"this CLIP takes \(B, 12\)"):
        model.encode_text(torch.zeros(1, 77, dtype=torch.long))


def test_training_forward_agrees_with_encoding_and_has_gradients(model: ClipModel, images: np.ndarray) -> None:
    tokens = model.tokenize(CAPTIONS)
    image, text, scale = model(torch.from_numpy(images), tokens)
    torch.testing.assert_close(image, model.encode_image(images))
    torch.testing.assert_close(text, model.encode_text(tokens))
    assert scale.item() == pytest.approx(1 / 0.07)
    trained = TINY.build().bfloat16()
    image, text, scale = trained(torch.from_numpy(images), tokens)
    torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    assert image.dtype == torch.float32


def test_logit_scale_is_capped(images: np.ndarray) -> None:
    model = TINY.build()
    torch.nn.init.constant_(model.clip.logit_scale, 10.0)
    assert model(torch.from_numpy(images), model.tokenize(CAPTIONS))[2].item() == 100.0


def test_checkpoints_are_open_clips(model: ClipModel, tmp_path: Path, images: np.ndarray) -> None:
    """open_clip itself builds the architecture and loads the weights."""
    theirs = open_clip.CLIP(**TINY.open_clip_config())
    theirs.load_state_dict(model.clip.state_dict())
    expected = theirs.eval().encode_image(model.preprocess(images), normalize=True)
    torch.testing.assert_close(model.encode_image(images), expected)


@pytest.fixture
def known_name(tmp_path: Path) -> str:
    """A small architecture that open_clip knows by name."""
    path = tmp_path / "unclip-tiny.json"
    path.write_text(json.dumps(TINY.open_clip_config()))
    open_clip.add_model_config(path)
    return "unclip-tiny"


def test_open_clip_name_alone_gives_the_same_random_weights_each_time(known_name: str) -> None:
    torch.manual_seed(1)
    first = load_clip(known_name)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # the caller's random state is left alone
    assert load_clip(known_name).fingerprint == first.fingerprint
    assert (first.embed_dim, first.image_size, first.context_length) == (16, 32, 12)


def test_open_clip_name_with_a_checkpoint_file(model: ClipModel, known_name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": model.clip.state_dict()}, tmp_path / "weights.pt")
    loaded = load_clip(f"{known_name}/{tmp_path / 'weights.pt'}")
    tokens = model.tokenize(CAPTIONS)
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))


def test_folder_may_name_an_open_clip_architecture(model: ClipModel, known_name: str, tmp_path: Path) -> None:
    folder = export(model, tmp_path / "clip", prefix="")
    (Path(folder) / "config.json").write_text(json.dumps({"kind": "clip", "source": f"{known_name}"}))
    tokens = model.tokenize(CAPTIONS)
    torch.testing.assert_close(load_clip(folder).encode_text(tokens), model.encode_text(tokens))
    assert tokenizer_for(folder).name == known_name


def test_a_tokenizer_remembers_a_bounded_number_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = clip_module._open_clip_tokenizer(None)
    known = dict(inner.cache)
    monkeypatch.setattr(clip_module, "_MOST_WORDS", len(known) + 2)
    words = [f"zq{letter}xj" for letter in "abcdef"]
    first = Tokenizer(None)([*words, "q" * 100], 77)
    added = inner.cache.keys() - known.keys()
    for word in added:
        del inner.cache[word]
    assert 0 < len(added) <= 2
    assert "q" * 100 not in added
    plain = open_clip.SimpleTokenizer()([*words, "q" * 100], context_length=77)
    np.testing.assert_array_equal(first, plain)


def test_tokenizer_is_open_clips_and_pickles() -> None:
    tokenizer = pickle.loads(pickle.dumps(tokenizer_for(None)))
    tokens = tokenizer(CAPTIONS, 12)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, open_clip.tokenize(CAPTIONS, 12).numpy())
    assert tokenizer([], 12).shape == (0, 12)
    np.testing.assert_array_equal(tokenizer_for("ViT-B-32")(CAPTIONS, 12), tokens)
    assert len(pickle.dumps(Tokenizer("ViT-B-32"))) < 200


@pytest.mark.parametrize("load", [load_clip, tokenizer_for])
def test_unknown_names_are_refused_with_close_ones(load: object) -> None:
    with pytest.raises(ValueError, match=r"'ViT-B-23/openai' is no folder .* did you mean .*'ViT-B-32'"):
        load("ViT-B-23/openai")  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"'opnai' is neither a checkpoint file nor a pretrained tag of ViT-B-32; tags: .*openai"
    ):
        load("ViT-B-32/opnai")  # type: ignore[operator]


def test_config_wants_exactly_one_of_both() -> None:
    for settings in ({}, {"source": "ViT-B-32", "architecture": TINY.to_dict()}):
        with pytest.raises(ValueError, match="exactly one of source and architecture"):
            ClipConfig.from_dict(settings)


@pytest.mark.parametrize(("field", "value"), [("vision_patch_size", 5), ("vision_head_width", 24), ("text_heads", 3)])
def test_impossible_shapes_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}: does not divide"):
        TINY.merged({field: value})
