"""A whole chain of tiny stages with random weights, saved as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import StageConfig, stage_config_from_dict

TEXT = {"context_length": 16, "width": 16, "depth": 1, "heads": 2}
PIXELS = {"prediction_type": "epsilon", "num_train_timesteps": 50, "clip_sample_range": 1.0}


def _unet(**changes: Any) -> dict[str, Any]:
    return {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, **changes}


def _upsampler(kind: str, low_res_size: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "model": {"unet": _unet(in_channels=6, image_size=2 * low_res_size)},
        "diffusion": PIXELS,
        "sampling": {"sampler": "ddim", "num_inference_steps": 2},
        "low_res_size": low_res_size,
        "image_size": 2 * low_res_size,
    }


@pytest.fixture(scope="session")
def tiny_configs() -> Mapping[str, StageConfig]:
    """Every stage of a cascade 16 -> 32 -> 64 pixels."""
    stages = [
        {
            "kind": "clip",
            "architecture": {
                "embed_dim": 8,
                "image_size": 16,
                "vision_layers": 1,
                "vision_width": 16,
                "vision_patch_size": 8,
                "vision_head_width": 8,
                "context_length": 16,
                "text_width": 16,
                "text_heads": 2,
                "text_layers": 1,
            },
        },
        {
            "kind": "prior",
            "model": {"embed_dim": 8, **TEXT},
            "diffusion": {"prediction_type": "sample", "num_train_timesteps": 50},
            "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
            "normalizer": {"std": 0.3},
        },
        {
            "kind": "decoder",
            "model": {
                "unet": _unet(out_channels=6, attention_resolutions=[8], image_size=16),
                "text": TEXT,
                "embed_dim": 8,
            },
            "diffusion": {**PIXELS, "variance_type": "learned_range"},
            "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
            "normalizer": {"std": 0.3},
            "image_size": 16,
        },
        _upsampler("upsampler_256", 16),
        _upsampler("upsampler_1024", 32),
    ]
    return {stage["kind"]: stage_config_from_dict(stage) for stage in stages}


@pytest.fixture(scope="session")
def tiny_models(tiny_configs: Mapping[str, StageConfig]) -> Mapping[str, nn.Module]:
    """The networks, with weights that are nowhere zero, so that every input counts."""
    torch.manual_seed(0)
    models = {}
    for name, config in tiny_configs.items():
        models[name] = config.build().eval().requires_grad_(False)
        for parameter in models[name].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return models


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_configs: Mapping[str, StageConfig],
    tiny_models: Mapping[str, nn.Module],
) -> str:
    """Address of a bundle with all five stages; tests that change it copy it first."""
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    clip = ClipReference(source="clip", fingerprint=str(tiny_models["clip"].fingerprint))
    for name, config in tiny_configs.items():
        reference = None if name.startswith("upsampler") else clip
        save_stage(uri, config, tensors=tiny_models[name].state_dict(), clip=reference, provenance={"step": 7})
    return uri
