"""What each stage learns: one objective a stage, all behind the same three methods."""

from __future__ import annotations

from unclip.training.objectives.base import LossOutput, Objective
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig

ObjectiveConfig = ClipObjectiveConfig | PriorObjectiveConfig | DecoderObjectiveConfig | UpsamplerObjectiveConfig

__all__ = ["LossOutput", "Objective", "ObjectiveConfig"]
