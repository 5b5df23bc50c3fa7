"""A bundle of tiny stages with random weights: 16 and 32 pixels, and a CLIP that scores."""

from __future__ import annotations

from typing import Any

import torch

from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import stage_config_from_dict

_TEXT = {"context_length": 16, "width": 16, "depth": 1, "heads": 2}
_UNET = {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8}
_PIXELS = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "clip_sample_range": 1.0}
_CLIP = {
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
}
_STAGES: tuple[dict[str, Any], ...] = (
    {"kind": "clip", "architecture": _CLIP},
    {
        "kind": "prior",
        "model": {"embed_dim": 8, **_TEXT},
        "diffusion": {"prediction_type": "sample", "num_train_timesteps": 1000},
        "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "normalizer": {"std": 0.3},
    },
    {
        "kind": "decoder",
        "model": {
            "unet": {**_UNET, "out_channels": 6, "attention_resolutions": [8], "image_size": 16},
            "text": _TEXT,
            "embed_dim": 8,
        },
        "diffusion": {**_PIXELS, "variance_type": "learned_range"},
        "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "normalizer": {"std": 0.3},
        "image_size": 16,
    },
    {
        "kind": "upsampler_256",
        "model": {"unet": {**_UNET, "in_channels": 6, "image_size": 32}},
        "diffusion": _PIXELS,
        "sampling": {"sampler": "ddim", "num_inference_steps": 2},
        "low_res_size": 16,
        "image_size": 32,
    },
)


def save_tiny_bundle(uri: str) -> None:
    """Weights are nowhere zero, so that every input counts."""
    torch.manual_seed(0)
    fingerprint = ""
    for stage in _STAGES:
        config = stage_config_from_dict(stage)
        model = config.build().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        fingerprint = fingerprint or str(model.fingerprint)
        clip = None if stage["kind"].startswith("upsampler") else ClipReference(source="clip", fingerprint=fingerprint)
        save_stage(uri, config, tensors=model.state_dict(), clip=clip, provenance={})
