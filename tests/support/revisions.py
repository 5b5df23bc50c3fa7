"""Bundles of the same shapes with other weights: what a server changes over to."""

from __future__ import annotations

from pathlib import Path

import torch

from unclip.pipelines.bundle import Bundle, save_stage


def save_with_other_weights(uri: str, folder: Path, *, seed: int = 99) -> str:
    """The bundle at `uri` as if it had been trained on, its CLIP excepted; returns where it is."""
    bundle, generator = Bundle.load(uri), torch.Generator().manual_seed(seed)
    for name, config in bundle.configs.items():
        tensors = bundle.load_model(name).state_dict()
        if name != "clip":
            tensors = {
                key: value + 0.05 * torch.randn(value.shape, generator=generator)
                if value.is_floating_point()
                else value
                for key, value in tensors.items()
            }
        save_stage(str(folder), config, tensors=tensors, clip=bundle.manifests[name].clip, provenance={})
    return str(folder)
