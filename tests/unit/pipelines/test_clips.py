"""CLIPs by name: those of a hub in open_clip's format, and names that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.hub import running_hub

from unclip.config.base import ConfigError
from unclip.models.clip import ClipArchitectureConfig
from unclip.pipelines.clips import absolute_clip, load_clip_named

NAME = "hf-hub:someone/clip"
SHAPE = ClipArchitectureConfig(
    embed_dim=8,
    image_size=16,
    vision_layers=1,
    vision_width=16,
    vision_patch_size=8,
    vision_head_width=8,
    context_length=16,
    text_width=16,
    text_heads=2,
    text_layers=1,
)


def test_of_a_hub_is_the_one_that_was_published(tmp_path: Path) -> None:
    published = SHAPE.build().eval()
    weights = {
        name: tensor.reshape(()) if name == "logit_scale" else tensor
        for name, tensor in published.clip.state_dict().items()
    }
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(weights, folder / "open_clip_model.safetensors")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    settings = {"model_cfg": SHAPE.open_clip_config(), "preprocess_cfg": {"mean": mean, "std": std}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with running_hub(tmp_path / "cache") as hub:
        hub.publish("someone/clip", folder)
        assert absolute_clip(NAME) == NAME  # as training and embedding store it
        clip = load_clip_named(NAME)
        tokens = clip.tokenize(["a red circle"])
        with pytest.raises(ConfigError, match="clip = 'hf-hub:someone/else'"):
            load_clip_named("hf-hub:someone/else")
    torch.testing.assert_close(clip.encode_text(tokens), published.encode_text(tokens))
    assert (list(clip.description.mean), list(clip.description.std)) == (mean, std)


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip = 'ViT-B-33'.*did you mean"):
        load_clip_named("ViT-B-33")


def test_a_folder_of_ours_is_absolute_and_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert absolute_clip("clip") == str(tmp_path / "clip")
    assert absolute_clip("ViT-B-32/openai") == "ViT-B-32/openai"
