"""Small objectives of the diffusion stages, batches for them, and what their losses are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from unclip.pipelines.stages import DecoderStageConfig, PriorStageConfig, UpsamplerStageConfig
from unclip.training.objectives import Objective
from unclip.training.objectives.base import BaseObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig
from unclip.utils.random import SampleGenerator

T, D, LENGTH, END = 50, 6, 5, 19
SEED = 3
TEXT = {"context_length": LENGTH, "width": 8, "depth": 1, "heads": 2, "vocab_size": END + 1}
PIXELS = {"num_train_timesteps": T}
SAMPLING = {"num_inference_steps": 2}
Batch = dict[str, torch.Tensor]


def unet(**changes: Any) -> dict[str, Any]:
    return {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, "image_size": 8} | changes


def prior(**changes: Any) -> PriorObjectiveConfig:
    stage = {
        "model": {"embed_dim": D, **TEXT},
        "diffusion": {**PIXELS, "prediction_type": "sample"},
        "sampling": SAMPLING,
        "normalizer": {"mean": 0.1, "std": 0.25},
    }
    return PriorObjectiveConfig(stage=PriorStageConfig.from_dict(stage), **changes)


def decoder(*, variance_type: str = "learned_range", **changes: Any) -> DecoderObjectiveConfig:
    stage = {
        "model": {
            "unet": unet(out_channels=6 if variance_type == "learned_range" else 3, attention_resolutions=[4]),
            "text": TEXT,
            "embed_dim": D,
        },
        "diffusion": {**PIXELS, "variance_type": variance_type},
        "sampling": SAMPLING,
        "normalizer": {"mean": 0.1, "std": 0.25},
        "image_size": 8,
    }
    return DecoderObjectiveConfig(stage=DecoderStageConfig.from_dict(stage), **changes)


STATES, CLASSES = 4, ("cat", "dog", "owl")
VARIANTS = {
    "glide": {"model": {"embed_dim": None}},
    "states": {"model": {"text": None, "text_states": {"context_length": LENGTH, "state_dim": STATES, "width": 8}}},
    "adm": {
        "model": {"text": None, "embed_dim": None, "num_classes": len(CLASSES)},
        "label_column": "kind",
        "classes": CLASSES,
    },
    "inpainting": {"model": {"inpainting": True, "unet": {"in_channels": 7}}},
}


def variant(name: str, *, variance_type: str = "learned_range", **changes: Any) -> DecoderObjectiveConfig:
    """A decoder that is told something else than unCLIP's."""
    stage = decoder(variance_type=variance_type).stage.merged(VARIANTS[name])
    return DecoderObjectiveConfig(stage=stage, **changes)


def upsampler(*, noise_conditioning: bool = False) -> UpsamplerObjectiveConfig:
    stage = {
        "kind": "upsampler_256",
        "model": {"unet": unet(in_channels=6, image_size=32), "noise_conditioning": noise_conditioning},
        "diffusion": {**PIXELS, "beta_schedule": "squaredcos_cap_v2"},
        "sampling": SAMPLING,
        "low_res_size": 8,
        "image_size": 32,
    }
    return UpsamplerObjectiveConfig(stage=UpsamplerStageConfig.from_dict(stage), degradation="none")


def build(config: BaseObjectiveConfig) -> Objective:
    """With weights that are nowhere zero, so that every input counts."""
    torch.manual_seed(0)
    objective = config.build()
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def make_batch(count: int, seed: int = 1) -> Batch:
    """What the stream delivers, of every column that any of these objectives takes."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, END, (count, LENGTH), generator=random, dtype=torch.int32)
    tokens[:, -2] = END
    tokens[:, -1] = 0
    return {
        "id": torch.arange(count) + 1000,
        "position": torch.randint(10**6, (count,), generator=random),
        "tokens": tokens,
        "image_embed": torch.randn(count, D, generator=random).half(),
        "text_embed": torch.randn(count, D, generator=random).half(),
        "text_states": torch.randn(count, LENGTH * STATES, generator=random).half(),
        "label": torch.randint(len(CLASSES), (count,), generator=random),
        "image": torch.randint(256, (count, 8, 8, 3), generator=random, dtype=torch.uint8),
        "low_res": torch.randint(256, (count, 2, 2, 3), generator=random, dtype=torch.uint8),
    }


def streams(batch: Batch) -> SampleGenerator:
    return SampleGenerator.for_samples(SEED, batch["position"])


class Recorded(nn.Module):
    """Calls the network and keeps what it was given and what it answered."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        self.x_t, self.timesteps, self.cond = x_t, timesteps, cond
        self.output = self.network(x_t, timesteps, cond)
        return self.output


class Zero(nn.Module):
    """Answers zeros, so that many samples cost nothing."""

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.zeros_like(x_t)


def cosine_alphas_cumprod() -> np.ndarray:
    """Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999."""
    angle = (np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2
    f = np.cos(angle) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def noised(x_start: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, noise and timesteps as the samples' own streams say, by the formula of the forward process."""
    generator = streams(batch)
    timesteps, noise = generator.integers(T), generator.normal(tuple(x_start.shape[1:]))
    abar = torch.from_numpy(cosine_alphas_cumprod()).float()[timesteps].view(-1, *[1] * (x_start.ndim - 1))
    return abar.sqrt() * x_start + (1 - abar).sqrt() * noise, noise, timesteps


def pixels(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 3, 1, 2).float() / 127.5 - 1


def depends(config: BaseObjectiveConfig, name: str) -> bool:
    """Whether the loss changes when another batch's `name` is put in."""
    objective, batch = build(config), make_batch(5)
    changed = batch | {name: make_batch(5, seed=2)[name]}
    losses = [objective.loss(objective.model, given, streams(given)).loss for given in (batch, changed)]
    return not torch.equal(*losses)
