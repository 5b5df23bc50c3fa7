"""The `clip` stage."""

from __future__ import annotations

from typing import Literal

from unclip.config.base import Config
from unclip.models.clip import ClipArchitectureConfig, ClipModel


class ClipStageConfig(Config):
    """The contrastive text-image space that the other stages of the bundle were trained in."""

    kind: Literal["clip"] = "clip"
    """Names this kind of stage."""
    architecture: ClipArchitectureConfig
    """Shape of both towers."""

    def build(self) -> ClipModel:
        """The network with random weights."""
        return self.architecture.build()
