"""The `prior` stage as a diffusion model: caption to CLIP image embedding (unCLIP §2.2)."""

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
from unclip.pipelines.stages.checks import check_normalizer, check_unit_norm, device_of
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
from unclip.pipelines.stages.draws import best_draw, draws_of, of_all_draws
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
    unit_norm: bool = True
    """Whether z_i has unit norm; false: it is as CLIP's projection gives it, whose norm then counts (Karlo)."""
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


class PriorStage(DiffusionStage):
    """Caption to CLIP image embedding (unCLIP §2.2); arguments as for `DiffusionStage`."""

    def __init__(self, config: PriorStageConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.config = config
        self._normalizer = config.normalizer.build().to(device_of(model))

    def begin(
        self,
        text_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        negative: PriorCondition | None = None,
    ) -> Start:
        """One draw for each of B captions; arguments as for `sample`."""
        check_unit_norm("text_embed", text_embed)
        if negative is not None:
            check_unit_norm("negative.text_embed", negative.text_embed)
        x_T = generator.normal((self.config.model.embed_dim,))
        return Start(x_T, PriorCondition.of_captions(text_embed, tokens), negative)

    def finish(self, x_start: torch.Tensor) -> torch.Tensor:
        """z_i (B, D): with `config.unit_norm` CLIP's embeddings lie on the unit sphere, and so the draws are put back on it."""
        embeds = self._normalizer.denormalize(x_start)
        return functional.normalize(embeds, dim=1) if self.config.unit_norm else embeds

    def sample(
        self,
        text_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        negative: PriorCondition | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """z_i (B, D): the best of `config.num_draws` for each caption.

        Args:
            text_embed: (B, D) z_t, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B captions; every draw has one of its own.
            negative: B captions that guidance leads away from; None: from no caption at all.

        Raises `ValueError` where a text embedding is not of unit norm.
        """
        z_t, captions, streams = draws_of(text_embed, tokens, generator, self.config.num_draws)
        away = None if negative is None else of_all_draws(negative, self.config.num_draws)
        start = self.begin(z_t, captions, streams, negative=away)
        draws = self.run(start, streams, sampling=sampling, progress=progress)
        return best_draw(draws, text_embed)
