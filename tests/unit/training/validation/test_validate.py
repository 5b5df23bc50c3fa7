"""Validations of real models on real drawings, each number made again from its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.embedded import save_clip
from tests.support.objectives import build
from torch.nn import functional

from unclip.data.batches import BatchSpec
from unclip.models.clip import ClipModel, load_clip
from unclip.models.prior import PriorModel
from unclip.pipelines.stages import PriorStage, PriorStageConfig, StageName
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.export import full_state_dict
from unclip.training.in_process import embed_here, local_batches
from unclip.training.loop import Trainer
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run
from unclip.training.validation.records import HeldOut
from unclip.training.validation.result import Validation
from unclip.training.validation.validate import validate, validate_objective
from unclip.utils.random import SampleGenerator

CPU = torch.device("cpu")
EMBEDDED = ("prior", "decoder")


@pytest.fixture(scope="module")
def folder(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, and drawings embedded by it: `train` and `heldout`."""
    out = tmp_path_factory.mktemp("validate")
    clip = save_clip(str(out), tiny_architecture())
    for split in ("train", "heldout"):
        embed_here(f"{openmoji}/64/{split}", str(out / split), clip)
    return out


@pytest.fixture
def config(openmoji: str, folder: Path, tmp_path: Path) -> Any:
    def make(stage: StageName, **validation: Any) -> TrainConfig:
        size = 256 if "upsampler" in stage else 64
        data = str(folder) if stage in EMBEDDED else f"{openmoji}/{size}"
        changes: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "bundle": None,
            "clip": None,
            "data": {"path": f"{data}/train"},
            "validation": {"every_steps": 1, "data": f"{data}/heldout", "samples": 12, "rows": 2, **validation},
        }
        if stage in EMBEDDED:
            changes |= {"objective": {"stage": {"model": {"embed_dim": tiny_architecture().embed_dim}}}}
        return prepare_run(RECIPES[stage]["debug"]().merged(changes)).config

    return make


def validated(config: TrainConfig) -> Validation:
    return validate_objective(config, build(config.objective), CPU)


def buckets(validation: Validation, name: str) -> list[float]:
    return [value for key, value in validation.metrics.items() if key.startswith(f"{name}_t")]


def test_it_is_the_moving_average_that_is_validated(config: Any) -> None:
    settings: TrainConfig = config("decoder").merged({"optimizer": {"ema_decay": 0.5, "learning_rate": 0.1}})
    prepared = prepare_run(settings)
    RunFolder(prepared.config.run).open(prepared.config)
    Trainer(prepared.config, rank=0, device=CPU).train(local_batches(prepared))
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    found = validate(prepared.config, newest, CPU)
    by_kind = {}
    for kind in ("ema", "fp32"):
        objective = prepared.config.objective.build()
        objective.model.load_state_dict(full_state_dict(newest, kind))  # type: ignore[arg-type]
        by_kind[kind] = validate_objective(prepared.config, objective, CPU)
    assert found.metrics == by_kind["ema"].metrics != by_kind["fp32"].metrics
    assert found.grid is not None
    assert by_kind["ema"].grid is not None
    for (_, ours), (_, theirs) in zip(found.grid.rows, by_kind["ema"].grid.rows, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def test_a_decoder_s_grid_and_what_clip_says_to_it(config: Any, folder: Path) -> None:
    settings: TrainConfig = config("decoder")
    found = validated(settings)
    assert found.grid is not None
    assert found.grid.titles == ("real", "sample 1", "sample 2")
    batch = HeldOut(settings, CPU).first(2)
    captions = HeldOut(settings, CPU).text("caption", 2)
    assert [caption for caption, _ in found.grid.rows] == captions
    pictures = np.array([row for _, row in found.grid.rows])  # (2 rows, 3 columns, 64, 64, 3)
    assert np.array_equal(pictures[:, 0], batch["image"].numpy())
    assert len({column.tobytes() for row in pictures for column in row}) == 6
    clip = load_clip(f"{folder}/clip")
    text = clip.encode_text(clip.tokenize(captions))
    embeds = torch.stack([clip.encode_image(pictures[:, column]) for column in range(3)])
    expected = {
        "clip_score": (embeds[1:] * text).sum(dim=2).mean(),
        "clip_score_image": (embeds[1:] * functional.normalize(batch["image_embed"].float(), dim=1)).sum(dim=2).mean(),
        "clip_score_real": (embeds[0] * text).sum(dim=1).mean(),
    }
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(float(value), abs=1e-6)
    assert len(buckets(found, "loss")) == 10
    assert found.metrics["mse"] > 0


def test_a_decoder_draws_prompts_without_any_record(config: Any) -> None:
    settings: TrainConfig = config("decoder", prompts=("a red heart", "a cat"), data=None)
    found = validated(settings)
    assert set(found.metrics) == {"clip_score", "clip_score_image"}
    assert found.grid is not None
    assert found.grid.titles == ("sample 1", "sample 2")
    assert [caption for caption, _ in found.grid.rows] == ["a red heart", "a cat"]


def test_embeddings_made_of_the_records_give_what_columns_give(config: Any, openmoji: str, folder: Path) -> None:
    stored: TrainConfig = config("decoder")
    changes = {
        "clip": f"{folder}/clip",
        "data": {"path": f"{openmoji}/64/train", "embeddings": "stream"},
        "validation": {"data": f"{openmoji}/64/heldout"},
    }
    made = validated(stored.merged(changes)).metrics
    for name, value in validated(stored).metrics.items():
        assert made[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_prior_s_cosines_and_the_pictures_nearest_to_its_samples(config: Any) -> None:
    settings: TrainConfig = config("prior")
    found = validated(settings)
    stage, model = settings.objective.stage_config(), build(settings.objective).model.eval()
    assert isinstance(stage, PriorStageConfig)
    assert isinstance(model, PriorModel)
    batch = HeldOut(settings, CPU).first(12)
    real, text = (functional.normalize(batch[name].float(), dim=1) for name in ("image_embed", "text_embed"))
    streams = SampleGenerator.for_samples(0, torch.arange(12)).child("sample")
    with torch.no_grad():
        sampled = PriorStage(stage, model).sample(text, batch["tokens"].long(), streams, sampling=stage.sampling)
    expected = {
        "cosine_image": [sampled[i] @ real[i] for i in range(12)],
        "cosine_text": [sampled[i] @ text[i] for i in range(12)],
        "cosine_text_real": [real[i] @ text[i] for i in range(12)],
    }
    for name, cosines in expected.items():
        assert found.metrics[name] == pytest.approx(float(sum(cosines)) / 12, abs=1e-5), name
    captions = HeldOut(settings, CPU).text("caption", 12)
    others = [sampled[i] @ text[j] for i in range(12) for j in range(12) if captions[i] != captions[j]]
    assert found.metrics["cosine_text_unrelated"] == pytest.approx(float(sum(others)) / len(others), abs=1e-5)
    assert len(buckets(found, "loss")) == 10
    assert found.grid is not None
    records = HeldOut(settings, CPU)
    for index, (caption, pictures) in enumerate(found.grid.rows):
        nearest = sorted(range(12), key=lambda row: -float(sampled[index] @ real[row]))[:3]
        wanted = records.pictures([index, *nearest], BatchSpec(image_size=128))["image"].numpy()
        assert np.array_equal(np.array(pictures), wanted)
        assert caption == records.text("caption", 2)[index]


def test_an_upsampler_s_grid_and_its_distance_from_the_real_pictures(config: Any) -> None:
    found = validated(config("upsampler_256"))
    assert found.grid is not None
    assert found.grid.titles == ("64 px", "sample", "real")
    ratios = []
    for _, (small, sample, real) in found.grid.rows:
        assert small is not None
        assert sample is not None
        assert real is not None
        assert (small.shape, sample.shape, real.shape) == ((64, 64, 3), (256, 256, 3), (256, 256, 3))
        assert np.abs(real.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3)) - small).mean() < 2
        ratios.append(10 * np.log10(255**2 / np.square(sample.astype(float) - real).mean()))
    assert found.metrics["psnr"] == pytest.approx(np.mean(ratios))
    assert found.metrics["psnr_interpolated"] > found.metrics["psnr"] + 5  # its weights are random
    assert len(buckets(found, "loss")) == 10


def test_a_clip_s_retrieval_and_zero_shot_accuracy(config: Any) -> None:
    settings: TrainConfig = config("clip", label_column="gender", label_prompt="a drawing of a {}", samples=40)
    found = validated(settings)
    model = build(settings.objective).model.eval()
    assert isinstance(model, ClipModel)
    records = HeldOut(settings, CPU)
    batch, labels = records.first(40), records.text("gender", 40)
    images = model.encode_image(batch["image"])
    prompts = {label: model.encode_text(model.tokenize([f"a drawing of a {label}"]))[0] for label in set(labels)}
    said = [max(prompts, key=lambda label: float(image @ prompts[label])) for image in images]
    assert found.metrics["zero_shot"] == pytest.approx(np.mean([a == b for a, b in zip(said, labels, strict=True)]))
    assert found.metrics["zero_shot_chance"] == 1 / len(prompts) < 1
    nearest = (images @ model.encode_text(batch["tokens"]).T).argmax(dim=1)
    captions = records.text("caption", 40)
    right = [captions[int(row)] == captions[index] for index, row in enumerate(nearest)]
    assert found.metrics["retrieval_text"] == pytest.approx(np.mean(right))
    assert found.grid is None


@pytest.mark.parametrize("stage", ["noised_clip", "classifier"])
def test_a_guide_s_accuracy_by_noise(config: Any, stage: StageName) -> None:
    found = validated(config(stage))
    accuracies = buckets(found, "accuracy")
    assert len(accuracies) == 10
    assert found.metrics["accuracy"] == pytest.approx(np.mean(accuracies))
    assert "loss_t900-999" in found.metrics
    assert found.grid is None


def test_a_decoder_of_classes_is_shown_by_what_it_is_told(openmoji: str, tmp_path: Path) -> None:
    changes = {
        "run": str(tmp_path / "run"),
        "bundle": None,
        "data": {"path": f"{openmoji}/64/train"},
        "validation": {"every_steps": 1, "data": f"{openmoji}/64/heldout", "samples": 10, "rows": 3},
    }
    config = prepare_run(RECIPES["decoder"]["adm_debug"]().merged(changes)).config
    grid = validated(config).grid
    assert grid is not None
    assert [said for said, _ in grid.rows] == HeldOut(config, CPU).text("colour", 3)
