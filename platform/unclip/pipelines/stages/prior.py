"""The `prior` stage as a diffusion model: caption to CLIP image embedding (unCLIP §2.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unclip.config.base import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.models.prior import PriorCondition, PriorConfig, PriorModel
from unclip.pipelines.stages.checks import check_normalizer, device_of, prepare_of
from unclip.pipelines.stages.draws import best_of_draws
from unclip.utils.random import SampleGenerator


class PriorStageConfig(Config):
    """Caption to CLIP image embedding by diffusion (unCLIP §2.2)."""

    kind: Literal["prior"] = "prior"
    """Names this kind of stage."""
    prior_type: Literal["diffusion"] = "diffusion"
    """Which of the two kinds of prior it is."""
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
                "use fixed_small, fixed_large or analytic"
            )
        self.sampling.timesteps(self.diffusion.num_train_timesteps)  # refuses steps that the process does not have
        check_normalizer(self.normalizer, self.model.embed_dim)
        return self

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return True

    def build(self) -> PriorModel:
        """The network with random weights."""
        return self.model.build()

    def stage(self, model: nn.Module) -> PriorStage:
        """The stage with its network."""
        return PriorStage(self, model)


class PriorStage:
    """Caption to CLIP image embedding (unCLIP §2.2).

    Args:
        config: the stage as the bundle describes it.
        model: its network, on the device and in the precision that it is to run in; the sampler is always float32.
    """

    def __init__(self, config: PriorStageConfig, model: nn.Module) -> None:
        self.config = config
        self._model = model
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

        Args:
            text_embed: (B, D) z_t, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B captions.
        """

        def draw(cond: PriorCondition, streams: SampleGenerator) -> torch.Tensor:
            x_T = streams.normal((self.config.model.embed_dim,))
            normalized = sampling.sample(
                self._model,
                x_T,
                self._process,
                streams,
                cond,
                prepare=prepare_of(self._model),
                progress=progress,
            )
            return self._normalizer.denormalize(normalized)

        return best_of_draws(draw, text_embed, tokens, generator, num_draws=self.config.num_draws)
