"""What the training of a judge is asked for."""

from __future__ import annotations

from pydantic import Field

from unclip.config.base import Config


class TrainJudgeConfig(Config):
    """Which pictures a judge of attributes learns from, and how long."""

    records: tuple[str, ...] = ()
    """Folders of records with pictures, captions and a column for each attribute; required. All splits: see docs/judge.md."""
    out: str = ""
    """Folder of the judge; required. The same job run again trains what is missing."""
    attributes: tuple[str, ...] = Field(default=("role", "skin_tone", "hair", "count", "colour", "shape"), min_length=1)
    """Columns of classes that it learns; in them `none` means that a picture does not have the attribute."""
    image_size: int = Field(default=64, ge=16, multiple_of=16)
    """Side in pixels at which it sees pictures."""
    folds: int = Field(default=4, ge=2)
    """Networks, each trained on all drawings but its share."""
    steps: int = Field(default=2000, ge=1)
    """Optimizer steps of each network."""
    batch_size: int = Field(default=64, ge=2)
    """Pictures of a step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """At its peak; it rises and falls once (Smith and Topin 2018)."""
    width: int = Field(default=16, ge=1)
    """Channels of the first layer."""
    seed: int = Field(default=0, ge=0)
    """Chooses folds, initial weights, batches and augmentation."""
    device: str = "cpu"
    """A torch device."""
