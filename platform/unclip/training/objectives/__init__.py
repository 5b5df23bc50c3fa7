"""What each stage learns: one objective a stage, all behind the same three methods."""

from __future__ import annotations

from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.objectives.base import LossOutput, Objective
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.noised_clip import NoisedClipObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig

ObjectiveConfig = (
    ClipObjectiveConfig
    | NoisedClipObjectiveConfig
    | ClassifierObjectiveConfig
    | PriorObjectiveConfig
    | ARPriorObjectiveConfig
    | DecoderObjectiveConfig
    | UpsamplerObjectiveConfig
)

__all__ = ["LossOutput", "Objective", "ObjectiveConfig"]
