"""A decoder whose network is exact, so that what is done with it can be held against closed forms."""

from __future__ import annotations

import torch
from tests.support.gaussian import as_prediction, rowwise
from torch import nn

from unclip.models.decoder import DecoderCondition
from unclip.pipelines.stages import DecoderStage, DecoderStageConfig

VARIANCE = 0.1


class ExactDecoder(nn.Module):
    """The network of pictures whose pixels are N(mean of the channel, VARIANCE), the means read off z_i; 0 without."""

    def __init__(self, config: DecoderStageConfig) -> None:
        super().__init__()
        self.process = config.diffusion.build()
        self.weight = nn.Parameter(torch.ones(()))

    def prepare(self, cond: DecoderCondition) -> DecoderCondition:
        return cond

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: DecoderCondition) -> torch.Tensor:
        means = torch.where(cond.image.dropped[:, None], 0.0, 0.3 * cond.image.embed[:, :3])[:, :, None, None]
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        gain = abar.sqrt() * VARIANCE / (abar * VARIANCE + 1 - abar)
        x_start = means + gain * (x_t - abar.sqrt() * means)
        return as_prediction(self.process, x_start, x_t, timesteps)


def exact_decoder(config: DecoderStageConfig) -> DecoderStage:
    """The stage of `config`, with a process that such a network knows."""
    config = config.merged(
        {
            "model": {"unet": {"out_channels": 3}},
            "diffusion": {"variance_type": "fixed_small", "num_train_timesteps": 1000, "clip_sample_range": None},
        }
    )
    return DecoderStage(config, ExactDecoder(config))
