"""The `prior` stage: caption to CLIP image embedding (unCLIP §2.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.prior import PriorCondition, PriorConfig, PriorModel
from unclip.models.text import caption_mask
from unclip.pipelines.stages.checks import check_normalizer, device_of
from unclip.utils.random import SampleGenerator


class PriorStageConfig(Config):
    """Caption to CLIP image embedding by diffusion (unCLIP §2.2)."""

    kind: Literal["prior"] = "prior"
    """Names this kind of stage."""
    model: PriorConfig
    """The Transformer."""
    diffusion: DiffusionConfig
    """The noising process that it was trained to undo."""
    sampling: SamplingConfig
    """How it samples unless a request says otherwise."""
    normalizer: EmbeddingNormalizerConfig
    """Brings z_i to the unit variance that the process works on, and back."""
    num_draws: int = Field(2, ge=1, le=64)
    """Embeddings drawn for each caption, of which the one nearest z_t is kept (§2.2: two)."""

    @model_validator(mode="after")
    def _consistent(self) -> PriorStageConfig:
        if self.diffusion.variance_type == "learned_range":
            raise ValueError(
                "diffusion.variance_type = 'learned_range': the prior predicts z_i alone; "
                "use fixed_small or fixed_large"
            )
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        check_normalizer(self.normalizer, self.model.embed_dim)
        return self

    def build(self) -> PriorModel:
        """The network with random weights."""
        return self.model.build()


class PriorStage:
    """Caption to CLIP image embedding (unCLIP §2.2).

    Args:
        config: the stage as the bundle describes it.
        model: its network, on the device and in the precision that it is to run in; the sampler is always float32.
    """

    def __init__(self, config: PriorStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = model
        self._process = config.diffusion.build()
        self._normalizer = config.normalizer.build().to(device_of(model))

    def sample(
        self,
        text_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """z_i (B, D) of unit norm: the best of `config.num_draws` for each caption.

        "We improve quality by generating two samples of z_i and selecting the one with a higher dot product with z_t"
        (§2.2). CLIP's embeddings lie on the unit sphere, and so the draws are put back on it.

        Args:
            text_embed: (B, D) z_t, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B captions.
        """
        draws, batch = self.config.num_draws, len(text_embed)
        streams = SampleGenerator(torch.cat([generator.child(f"draw {draw}").keys for draw in range(draws)]))
        text_embed, tokens = text_embed.repeat(draws, 1), tokens.repeat(draws, 1)
        cond = PriorCondition(
            text_embed=text_embed,
            tokens=tokens,
            text_mask=caption_mask(tokens),
            text_dropped=tokens.new_zeros(len(tokens), dtype=torch.bool),
        )
        x_T = streams.normal((text_embed.shape[1],))
        normalized = sampling.sample(self._denoise, x_T, self._process, streams, cond, progress=progress)
        image_embed = functional.normalize(self._normalizer.denormalize(normalized), dim=1)
        similarity = (image_embed * functional.normalize(text_embed, dim=1)).sum(dim=1).view(draws, batch)
        best = similarity.argmax(dim=0)
        return image_embed.view(draws, batch, -1)[best, torch.arange(batch, device=best.device)]
