"""A bundle such as the demo makes, with random weights."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CLIP, prior, decoder (64 pixels) and the first upsampler (256), of recipe debug; weights are nowhere zero."""
    uri = str(tmp_path_factory.mktemp("docs") / "bundle")
    torch.manual_seed(0)
    clip: ClipReference | None = None
    for name in ("clip", "prior", "decoder", "upsampler_256"):
        stage = RECIPES[cast(StageName, name)]["debug"]().objective.stage_config()
        model = stage.build().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if isinstance(model, ClipModel):
            clip = ClipReference(source=f"{uri}/clip", fingerprint=model.fingerprint)
        save_stage(
            uri, stage, tensors=model.state_dict(), clip=clip if name != "upsampler_256" else None, provenance={}
        )
    return uri
