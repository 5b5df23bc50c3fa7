"""What is refused before a run starts, by the names of its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.embedded import save_clip

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training.config import TrainConfig
from unclip.training.in_process import embed_here
from unclip.training.setup import prepare_run
from unclip.training.validation.checks import check_validation


@pytest.fixture(scope="module")
def folder(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings embedded by two CLIPs."""
    out = tmp_path_factory.mktemp("checks")
    for name, seed in (("one", 0), ("other", 1)):
        clip = save_clip(str(out / name), tiny_architecture(), seed=seed)
        embed_here(f"{openmoji}/64/train", str(out / name / "train"), clip)
    return out


def make(stage: StageName, data: str, validation: dict[str, Any]) -> TrainConfig:
    changes: dict[str, Any] = {"run": "run", "bundle": None, "clip": None, "data": {"path": data}}
    if stage == "decoder":
        changes |= {"objective": {"stage": {"model": {"embed_dim": tiny_architecture().embed_dim}}}}
    config = prepare_run(RECIPES[stage]["debug"]().merged(changes)).config
    return config.merged({"validation": {"every_steps": 10} | validation})


def test_held_out_records_of_the_same_kind_are_taken(openmoji: str, folder: Path) -> None:
    check_validation(make("clip", f"{openmoji}/64/train", {"data": f"{openmoji}/64/heldout", "label_column": "gender"}))
    check_validation(make("decoder", f"{folder}/one/train", {"prompts": ["a cat"]}))


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({}, "validation.data: required with validation.every_steps"),
        ({"data": "train"}, "validation.data = .*: is a folder of the training data"),
        ({"data": "heldout", "prompts": ["a cat"]}, "validation.prompts: only stage decoder draws prompts, not clip"),
        ({"data": "heldout", "label_column": "colour"}, "a zero-shot test needs two labels, but .* have 'none'"),
    ],
)
def test_what_cannot_be_done_is_refused(openmoji: str, validation: dict[str, Any], message: str) -> None:
    if "data" in validation:
        validation = validation | {"data": f"{openmoji}/64/{validation['data']}"}
    with pytest.raises(ConfigError, match=message):
        check_validation(make("clip", f"{openmoji}/64/train", validation))


def test_missing_columns_and_folders_are_the_data_s_errors(openmoji: str, folder: Path) -> None:
    with pytest.raises(DataError, match="has no column 'kind'"):
        check_validation(
            make("clip", f"{openmoji}/64/train", {"data": f"{openmoji}/64/heldout", "label_column": "kind"})
        )
    with pytest.raises(DataError, match="does not exist"):
        check_validation(make("clip", f"{openmoji}/64/train", {"data": f"{folder}/nowhere"}))
    with pytest.raises(DataError, match="has no column 'image_embed'"):
        check_validation(make("decoder", f"{folder}/one/train", {"data": f"{openmoji}/64/heldout"}))


def test_embeddings_of_another_clip_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.data = .*: its embeddings are of another CLIP"):
        check_validation(make("decoder", f"{folder}/one/train", {"data": f"{folder}/other/train"}))


def test_a_clip_that_is_gone_or_has_changed_is_refused(folder: Path) -> None:
    config = make("decoder", f"{folder}/one/train", {"prompts": ["a cat"]})
    with pytest.raises(ConfigError, match="scores of the validation need it, but it cannot be loaded"):
        check_validation(config.merged({"clip": f"{folder}/gone"}))
    with pytest.raises(ConfigError, match="has changed since the embeddings were made"):
        check_validation(config.merged({"clip": f"{folder}/other/clip"}))


def test_only_clip_is_tested_zero_shot_and_prompts_of_labels_have_one_place_for_them(folder: Path) -> None:
    with pytest.raises(ConfigError, match="only stage clip is tested zero-shot"):
        check_validation(make("decoder", f"{folder}/one/train", {"prompts": ["a cat"], "label_column": "gender"}))
    with pytest.raises(ConfigError, match=r"label_prompt = 'a photo': must hold \{\} once"):
        make("decoder", f"{folder}/one/train", {"label_prompt": "a photo"})
