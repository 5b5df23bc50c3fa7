"""The `noised_clip` stage: steers the decoder's pictures towards their caption (GLIDE, section 4.4)."""

from __future__ import annotations

from typing import Literal

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.models.noised_clip import NoisedClipConfig, NoisedClipModel


class NoisedClipStageConfig(Config):
    """A CLIP of noised pictures, trained beside the decoder that it guides."""

    kind: Literal["noised_clip"] = "noised_clip"
    """Names this kind of stage."""
    model: NoisedClipConfig
    """Shape of both towers."""
    diffusion: DiffusionConfig
    """The process whose noised pictures it knows: that of the decoder it guides; only its noise counts here."""

    @property
    def image_size(self) -> int:
        """Side of its pictures in pixels."""
        return self.model.image_size

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return False

    def build(self) -> NoisedClipModel:
        """The network with random weights."""
        return self.model.build()
