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

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return True

    def build(self) -> ClipModel:
        """The network with random weights."""
        return self.architecture.build()
