"""The noised classifier (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from unclip.data.batches import BatchSpec
from unclip.pipelines.stages import ClassifierStageConfig
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, LossOutput, Objective, Rows
from unclip.training.objectives.noising import noised_pictures
from unclip.utils.random import SampleGenerator

QUARTERS = 4
"""Ranges of timesteps, from the least noise to the most, whose accuracy is reported apart."""


class ClassifierObjectiveConfig(BaseObjectiveConfig):
    """Training of a noised classifier."""

    kind: Literal["classifier"] = "classifier"
    stage: ClassifierStageConfig

    def batch_spec(self) -> BatchSpec:
        stage = self.stage
        return BatchSpec(image_size=stage.image_size, label_column=stage.label_column, classes=stage.classes)

    def stage_config(self) -> ClassifierStageConfig:
        return self.stage

    def with_classes(self, classes: tuple[str, ...]) -> ClassifierObjectiveConfig:
        """This objective for records whose label column holds these values."""
        return self.merged({"stage": {"classes": classes}})

    def build(self) -> ClassifierObjective:
        return ClassifierObjective(self)


class ClassifierObjective(Objective):
    """Cross-entropy of the class of a noised picture, each at a timestep of its own."""

    def __init__(self, config: ClassifierObjectiveConfig) -> None:
        self.model = config.stage.build()
        self.process = config.stage.diffusion.build()

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        timesteps = generator.integers(self.process.num_train_timesteps)
        rows = self.losses(model, batch, generator, timesteps)
        output = LossOutput.mean_of(rows)
        return LossOutput(output.loss, output.metrics | self._by_quarter(rows["accuracy"], timesteps))

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        assert timesteps is not None
        logits = model(noised_pictures(self.process, batch["image"], timesteps, generator), timesteps)
        is_right = (logits.argmax(dim=1) == batch["label"]).float()
        return {"loss": functional.cross_entropy(logits, batch["label"], reduction="none"), "accuracy": is_right}

    @property
    def num_train_timesteps(self) -> int | None:
        return self.process.num_train_timesteps

    def _by_quarter(self, is_right: torch.Tensor, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        """`accuracy_t1` (least noise) to `accuracy_t4` (most): unbiased, as means of them over batches must be.

        Divided by the share of timesteps in the quarter, not by how many samples fell into it: that may be none.
        """
        total = self.process.num_train_timesteps
        quarters = timesteps * QUARTERS // total
        edges = [-(-total * quarter // QUARTERS) for quarter in range(QUARTERS + 1)]
        return {
            f"accuracy_t{quarter + 1}": (is_right * (quarters == quarter)).mean() * total / max(1, stop - start)
            for quarter, (start, stop) in enumerate(pairwise(edges))
        }
