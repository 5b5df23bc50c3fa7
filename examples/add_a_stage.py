"""A stage from outside the package: a prior that regresses z_i from z_t, trained by the house's own runs.

    python examples/add_a_stage.py --set data.path=data/openmoji/64-clip/train

It minimises E|f(z_t) - z_i|^2, so it learns the mean of the image embeddings of a caption, and no distribution of them: the
baseline that a prior has to beat. Ray, DeepSpeed, checkpoints, restarts and `--set` come with the run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from unclip.cluster.jobs import train_job
from unclip.config.base import Config
from unclip.data.batches import BatchSpec
from unclip.recipes import shared
from unclip.training import checkpoint
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.export import full_state_dict
from unclip.training.objectives.base import BaseObjectiveConfig, Batch, LossOutput, Objective, Rows
from unclip.training.optim import OptimizerConfig
from unclip.training.run_folder import RunFolder
from unclip.utils.random import SampleGenerator


# --8<-- [start:model]
class RegressorConfig(Config):
    """A multilayer perceptron from z_t to z_i."""

    embed_dim: int = 128
    """Numbers of an embedding."""
    width: int = 512
    """Of the hidden layer; 0: a linear map."""

    def build(self) -> Regressor:
        return Regressor(self)


class Regressor(nn.Module):
    """`forward(z_t (B, D)) -> (B, D)`."""

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        size, width = config.embed_dim, config.width
        if width == 0:
            self.layers = nn.Sequential(nn.Linear(size, size))
        else:
            self.layers = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size))

    def forward(self, text_embed: torch.Tensor) -> torch.Tensor:
        return self.layers(text_embed.to(next(self.parameters()).dtype))


# --8<-- [end:model]
# --8<-- [start:stage]
class RegressorStageConfig(Config):
    """What inference needs to know beside the weights."""

    kind: Literal["regressor"] = "regressor"
    model: RegressorConfig = RegressorConfig()


# --8<-- [end:stage]
# --8<-- [start:objective]
class RegressorObjectiveConfig(BaseObjectiveConfig):
    """Which batches it wants, and what it is fitted to."""

    kind: Literal["regressor"] = "regressor"
    stage: RegressorStageConfig = RegressorStageConfig()

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        return ("image_embed", "text_embed")

    def batch_spec(self) -> BatchSpec:
        return BatchSpec(embeddings=self.embedding_columns)

    def with_embeddings(self, embed_dim: int, statistics: Mapping[str, Any] | None) -> RegressorObjectiveConfig:
        return self.merged({"stage": {"model": {"embed_dim": embed_dim}}})

    def stage_config(self) -> RegressorStageConfig:  # type: ignore[override]  # a stage that the house does not know
        return self.stage

    def build(self) -> RegressorObjective:
        return RegressorObjective(self)


class RegressorObjective(Objective):
    """The mean square error of a whole embedding."""

    def __init__(self, config: RegressorObjectiveConfig) -> None:
        self.model = config.stage.model.build()

    def loss(self, model: nn.Module, batch: Batch, generator: SampleGenerator) -> LossOutput:
        return LossOutput.mean_of(self.losses(model, batch, generator, None))

    def losses(
        self, model: nn.Module, batch: Batch, generator: SampleGenerator, timesteps: torch.Tensor | None
    ) -> Rows:
        predicted, image_embed = model(batch["text_embed"]).float(), batch["image_embed"].float()
        cosine = functional.cosine_similarity(predicted, image_embed).detach()
        return {"loss": (predicted - image_embed).square().sum(dim=1), "cosine": cosine}


# --8<-- [end:objective]
# --8<-- [start:use]
class RegressorRun(TrainConfig):
    """A training run of this stage."""

    stage: Literal["regressor"] = "regressor"  # type: ignore[assignment]  # in place of the house's stages
    objective: RegressorObjectiveConfig = RegressorObjectiveConfig()  # type: ignore[assignment]


def demo() -> RegressorRun:
    """Half a minute on two cores."""
    return RegressorRun(
        recipe="demo",
        run="runs/demo/regressor",
        data=TrainDataConfig(path=shared.openmoji(64, embedded=True), shuffle_rows=4096),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.99),
        zero=ZeroConfig(stage=1, precision="fp32"),
        loop=LoopConfig(max_steps=1000, global_batch_size=128, microbatch_size=128, time_limit_s=30.0),
    )


def load(run: str) -> Regressor:
    """The network with the run's averaged weights."""
    newest = checkpoint.latest(RunFolder(run).checkpoints_uri)
    assert newest is not None, f"{run} has no checkpoint"
    config = RegressorRun.load(f"{run}/config.json")
    model = config.objective.stage.model.build()
    model.load_state_dict(full_state_dict(newest))
    return model.eval()


def image_embeddings(model: Regressor, text_embed: torch.Tensor) -> torch.Tensor:
    """z_i (B, D) of unit norm for z_t (B, D): what `pipeline.draw(seeds).decode(image_embed=…)` takes."""
    with torch.no_grad():
        return functional.normalize(model(text_embed), dim=1)


# --8<-- [end:use]
if __name__ == "__main__":
    sys.exit(train_job(__doc__, {"demo": demo}))
