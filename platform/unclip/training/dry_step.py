"""A training step without data and without memory: a run's objective on PyTorch's fake tensors, which have shapes only.

For counting what a step does and keeps. Networks of billions of parameters take seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import group

from unclip.data.pca import PrincipalComponents
from unclip.diffusion.losses import DiffusionLossConfig
from unclip.training.config import TrainConfig
from unclip.training.objectives import LossOutput, Objective, ObjectiveConfig
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.utils.random import SampleGenerator

_CLASSES = 1000
"""Of a classifier whose data are not known yet: ImageNet's."""


class DryStep:
    """The objective of a run on fake tensors of the CPU.

    Everything that touches them happens inside `with DryStep.of(config) as dry:`.

    Attributes:
        objective: as the run builds it; its module has fake weights.
        config: the run's configuration.
    """

    def __init__(self, objective: Objective, config: TrainConfig) -> None:
        self.objective = objective
        self.config = config

    @classmethod
    @contextmanager
    def of(cls, config: TrainConfig) -> Iterator[DryStep]:
        """Builds the objective; until the block ends tensors are fake, and this process is alone: nothing is exchanged."""
        world, group.WORLD = group.WORLD, None  # a real group would wait for the other workers
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield cls(_build(config.objective), config)
        finally:
            group.WORLD = world

    def loss(self, batch: dict[str, torch.Tensor]) -> LossOutput:
        """The loss of a micro-batch, as the loop computes it."""
        generator = SampleGenerator.for_samples(self.config.seed, batch["position"])
        return self.objective.loss(self.objective.model, batch, generator)


def empty_batch(config: TrainConfig, size: int) -> dict[str, torch.Tensor]:
    """The columns of a micro-batch of `size` samples, as architecture.md names them, all zeros."""
    spec = config.objective.batch_spec()
    side, low_res = spec.output_size, spec.low_res_size
    batch = {name: torch.zeros(size, dtype=torch.int64) for name in ("id", "position")}
    if side:
        batch["image"] = torch.zeros(size, side, side, 3, dtype=torch.uint8)
    if low_res:
        batch["low_res"] = torch.zeros(size, low_res, low_res, 3, dtype=torch.uint8)
    if spec.tokenizer is not None:
        batch["tokens"] = torch.zeros(size, spec.context_length, dtype=torch.int32)
    if spec.label_column is not None:
        batch["label"] = torch.zeros(size, dtype=torch.int64)
    return batch | {name: torch.zeros(size, _width(config, name), dtype=torch.float16) for name in spec.embeddings}


def _width(config: TrainConfig, column: str) -> int:
    """Numbers of a row of a column of embeddings."""
    model: Any = getattr(config.objective.stage_config(), "model", None)
    states = model.text_states if column == "text_states" else None
    return int(model.embed_dim if states is None else states.context_length * states.state_dim)


def _build(config: ObjectiveConfig) -> Objective:
    """What a run takes from its data, any values will do for here: a classifier's classes, a prior's principal components."""
    if isinstance(getattr(config, "loss", None), DiffusionLossConfig):
        # What loss-aware draws have learned are numbers, which fake tensors do not have.
        config = config.merged({"loss": {"timestep_sampling": "uniform"}})
    if isinstance(config, ClassifierObjectiveConfig) and not config.stage.classes:
        config = config.with_classes(tuple(map(str, range(_CLASSES))))
    if not isinstance(config, ARPriorObjectiveConfig):
        return config.build()
    width = config.stage.model.embed_dim
    basis = PrincipalComponents(np.zeros(width), np.eye(width), np.ones(width), float(width), clip="")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "pca.safetensors"))
        basis.save(file)
        return config.merged({"pca": file}).build()
