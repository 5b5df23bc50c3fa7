"""The classifier's loss by its formula, and what a classifier learns of coloured squares at every noise level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.squares import COLOURS, SIDE, STAGE, coloured_squares, trained_classifier

from unclip.config.base import ConfigError
from unclip.models.classifier import ClassifierModel
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages import ClassifierStageConfig
from unclip.training.objectives.classifier import QUARTERS, ClassifierObjectiveConfig
from unclip.utils.random import SampleGenerator

T = STAGE["diffusion"]["num_train_timesteps"]
CONFIG = ClassifierObjectiveConfig(stage=ClassifierStageConfig.from_dict(STAGE))


@pytest.fixture(scope="module")
def trained() -> ClassifierModel:
    return trained_classifier()


def make_batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    image, label = coloured_squares(count, seed=seed)
    return {"position": torch.arange(count) + 1000 * seed, "image": image, "label": label}


def streams(batch: dict[str, torch.Tensor]) -> SampleGenerator:
    return SampleGenerator.for_samples(3, batch["position"])


def test_the_stage_says_which_batches_it_needs() -> None:
    spec = CONFIG.batch_spec()
    assert (spec.image_size, spec.label_column, spec.classes) == (SIDE, "colour", COLOURS)
    assert spec.columns() == ("id", "image", "colour")
    changed = CONFIG.with_classes(("a", "b"))
    assert changed.batch_spec().classes == ("a", "b")
    assert changed.build().model.pool.out.out_features == 2  # type: ignore[union-attr]


def test_the_loss_is_the_cross_entropy_of_noised_pictures() -> None:
    torch.manual_seed(0)
    objective, batch = CONFIG.build(), make_batch(64)
    output = objective.loss(objective.model, batch, streams(batch))
    generator = streams(batch)
    timesteps, noise = generator.integers(T), generator.normal((3, SIDE, SIDE))
    abar = CONFIG.stage.diffusion.build().alphas_cumprod(timesteps).float().view(-1, 1, 1, 1)
    x_t = abar.sqrt() * (batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1) + (1 - abar).sqrt() * noise
    logits = objective.model(x_t, timesteps).detach().double().numpy()
    label = batch["label"].numpy()
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert float(output.loss.detach()) == pytest.approx(-log_probability[np.arange(64), label].mean(), rel=1e-5)
    is_right = logits.argmax(axis=1) == label
    assert float(output.metrics["accuracy"]) == pytest.approx(is_right.mean())
    quarter = timesteps.numpy() // (T // QUARTERS)
    for index in range(QUARTERS):  # the share of hits in a quarter, over the quarter's share of timesteps
        expected = QUARTERS * (is_right & (quarter == index)).mean()
        assert float(output.metrics[f"accuracy_t{index + 1}"]) == pytest.approx(expected, rel=1e-5)


def test_accuracies_of_the_quarters_are_unbiased() -> None:
    """Over many samples of an always right answer each of them is 1."""
    objective, batch = CONFIG.build(), make_batch(3000)
    right = torch.nn.functional.one_hot(batch["label"], len(COLOURS)).float()
    output = objective.loss(lambda x_t, timesteps: right, batch, streams(batch))  # type: ignore[arg-type]
    for index in range(QUARTERS):
        assert float(output.metrics[f"accuracy_t{index + 1}"]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("timestep", "lowest", "highest"), [(0, 0.97, 1.0), (T // 4, 0.9, 1.0), (T - 1, 0.25, 0.42)])
def test_a_trained_classifier_is_as_sure_as_the_noise_lets_it(
    trained: ClassifierModel, timestep: int, lowest: float, highest: float
) -> None:
    """A third of 600 answers is right by chance, with a standard deviation of 0.02."""
    image, label = coloured_squares(600, seed=9)
    x_start = to_signed(image)
    timesteps = torch.full((600,), timestep)
    noise = SampleGenerator.for_samples(5, torch.arange(600)).normal(tuple(x_start.shape[1:]))
    with torch.no_grad():
        logits = trained(CONFIG.stage.diffusion.build().q_sample(x_start, timesteps, noise), timesteps)
    assert lowest <= float((logits.argmax(dim=1) == label).float().mean()) <= highest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["red"]}, "must be at least two"),
        ({"classes": ["red", "blue", "red"]}, "each of them once"),
        ({"label_column": ""}, "label_column"),
        ({"model": {"encoder": {"in_channels": 6, "out_channels": 6}}}, "in_channels = 6: must be 3"),
        ({"classes": [str(i) for i in range(10_001)]}, "classes"),
    ],
)
def test_stages_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIG.stage.merged(changes)


def test_no_network_is_built_while_the_classes_are_open() -> None:
    with pytest.raises(ConfigError, match="classes: empty; a run takes them of its data"):
        CONFIG.stage.merged({"classes": []}).build()
