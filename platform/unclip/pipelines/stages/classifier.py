"""The `classifier` stage: steers the decoder's pictures towards a class (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unclip.config.base import Config, ConfigError
from unclip.diffusion.process import DiffusionConfig
from unclip.models.classifier import ClassifierConfig, ClassifierModel
from unclip.pipelines.pictures import PICTURE_CHANNELS

MAX_CLASSES = 10_000
"""More distinct values are a sign that a column holds no classes."""


class ClassifierStageConfig(Config):
    """A classifier of noised pictures by one column of the records."""

    kind: Literal["classifier"] = "classifier"
    """Names this kind of stage."""
    model: ClassifierConfig
    """The way down of a U-Net with attention pooling."""
    diffusion: DiffusionConfig
    """The process whose noised pictures it knows: that of the decoder it guides; only its noise counts here."""
    label_column: str = Field(min_length=1)
    """Column of the records that holds the class, of any type; values are compared as text."""
    classes: tuple[str, ...] = Field(default=(), max_length=MAX_CLASSES)
    """What that column may hold, in the order of the logits; left empty, a training run takes all values of its data."""

    @model_validator(mode="after")
    def _consistent(self) -> ClassifierStageConfig:
        if self.model.encoder.in_channels != PICTURE_CHANNELS:
            raise ValueError(
                f"model.encoder.in_channels = {self.model.encoder.in_channels}: must be {PICTURE_CHANNELS}"
            )
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes = {self.classes}: must be at least two, each of them once, or left empty")
        return self

    @property
    def image_size(self) -> int:
        """Side of its pictures in pixels."""
        return self.model.encoder.image_size

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return False

    def build(self) -> ClassifierModel:
        """The network with random weights; `ConfigError` while its classes are open."""
        if not self.classes:
            raise ConfigError("classes: empty; a run takes them of its data, elsewhere they have to be named")
        return self.model.build(len(self.classes))
