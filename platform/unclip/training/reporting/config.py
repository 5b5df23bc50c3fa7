"""Where a run's metrics are shown beside its run folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unclip.config.base import Config


class WandbConfig(Config):
    """Weights & Biases; the key comes from the environment (`WANDB_API_KEY`)."""

    project: str = Field(min_length=1)
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; none: that of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline: written to the run folder, for `wandb sync`."""


class MlflowConfig(Config):
    """MLflow; credentials come from the environment."""

    tracking_uri: str = Field(min_length=1)
    """Address of the tracking server, or a folder."""
    experiment: str = Field(default="unclip", min_length=1)
    """Experiment that the run appears in."""


class ReportingConfig(Config):
    """Views of a run. Its folder holds everything they show."""

    tensorboard: bool = True
    """Write `RUN/tensorboard`."""
    wandb: WandbConfig | None = None
    """Weights & Biases, or none."""
    mlflow: MlflowConfig | None = None
    """MLflow, or none."""
