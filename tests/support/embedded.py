"""A frozen CLIP to embed records with."""

from __future__ import annotations

import torch

from unclip.models.clip import ClipArchitectureConfig
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import ClipStageConfig


def save_clip(bundle: str, architecture: ClipArchitectureConfig, *, seed: int = 0) -> str:
    """The folder of a `clip` stage with random weights."""
    torch.manual_seed(seed)
    model = architecture.build()
    reference = ClipReference(source=f"{bundle}/clip", fingerprint=model.fingerprint)
    stage = ClipStageConfig(architecture=architecture)
    save_stage(bundle, stage, tensors=model.state_dict(), clip=reference, provenance={})
    return reference.source
