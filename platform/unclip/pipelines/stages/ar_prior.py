"""The `prior` stage as an autoregressive model: caption to CLIP image embedding, code by code (unCLIP §2.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from unclip.config.base import Config
from unclip.diffusion.samplers import Progress
from unclip.models.ar_prior import ARPriorConfig, ARPriorModel
from unclip.models.prior import PriorCondition
from unclip.pipelines.stages.checks import check_unit_norm
from unclip.pipelines.stages.draws import best_draw, draws_of, of_all_draws
from unclip.utils.random import SampleGenerator


class ARSamplingConfig(Config):
    """How an autoregressive prior samples."""

    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance of the codes; 1 is off, 0 ignores the text."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of the codes: below 1 likelier codes, above 1 more diverse ones."""
    dot_percentile: float = Field(default=0.5, ge=0, lt=1)
    """The dot product of image and text embedding is drawn from above this share of its distribution (§2.2: half)."""


class ARPriorStageConfig(Config):
    """Caption to CLIP image embedding, one code of its principal components after the other (unCLIP §2.2)."""

    kind: Literal["prior"] = "prior"
    """Names this kind of stage."""
    prior_type: Literal["autoregressive"] = "autoregressive"
    """Which of the two kinds of prior it is."""
    model: ARPriorConfig
    """The Transformer, and the shape of its codes; the principal components are among its weights."""
    sampling: ARSamplingConfig = ARSamplingConfig()
    """How it samples unless a request says otherwise."""
    num_draws: int = Field(2, ge=1, le=64)
    """Embeddings drawn for each caption, of which the one nearest z_t is kept (§2.2: two)."""

    @property
    def in_clip_space(self) -> bool:
        """Whether its network sees or makes a CLIP's embeddings, and so fits only bundles of that CLIP."""
        return True

    def build(self) -> ARPriorModel:
        """The network with random weights."""
        return self.model.build()

    def stage(self, model: nn.Module) -> ARPriorStage:
        """The stage with its network."""
        assert isinstance(model, ARPriorModel)
        return ARPriorStage(self, model)


class ARPriorStage:
    """Caption to CLIP image embedding (unCLIP §2.2).

    Args:
        config: the stage as the bundle describes it.
        model: its network, on the device and in the precision that it is to run in.
    """

    def __init__(self, config: ARPriorStageConfig, model: ARPriorModel) -> None:
        self.config = config
        self.network = model

    def sample(
        self,
        text_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: ARSamplingConfig,
        negative: PriorCondition | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """z_i (B, D) of unit norm: the best of `config.num_draws` for each caption.

        Args:
            text_embed: (B, D) z_t, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B captions.
            negative: B captions that guidance leads away from; None: from no caption at all.
            progress: called with (codes drawn, codes in all), the dot product being one of them.

        Raises `ValueError` where a text embedding is not of unit norm.
        """
        check_unit_norm("text_embed", text_embed)
        if negative is not None:
            check_unit_norm("negative.text_embed", negative.text_embed)
        z_t, captions, streams = draws_of(text_embed, tokens, generator, self.config.num_draws)
        cond = PriorCondition.of_captions(z_t, captions)
        away = None if negative is None else of_all_draws(negative, self.config.num_draws)
        codes = draw_codes(self.network, cond, streams, sampling, negative=away, progress=progress)
        return best_draw(functional.normalize(self.network.codec.decode(codes), dim=1), text_embed)


def draw_codes(
    model: ARPriorModel,
    cond: PriorCondition,
    generator: SampleGenerator,
    sampling: ARSamplingConfig,
    *,
    negative: PriorCondition | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """(B, K) codes drawn under `cond`, each row from its own stream of `generator`, led away from `negative` or no text."""
    is_guided = sampling.guidance_scale != 1
    steps = model.config.num_components + 1

    def choose(index: int, logits: torch.Tensor) -> torch.Tensor:
        uniform, halves = generator.uniform(), len(logits) // cond.batch_size
        if (
            index == 0
        ):  # each half is told the dot product with its own text; without one there is none, and none is read
            quantiles = sampling.dot_percentile + (1 - sampling.dot_percentile) * uniform
            codes = draw_code(logits, quantiles.repeat(halves))
        else:
            conditional = logits[-cond.batch_size :]
            if is_guided:
                away = logits[: cond.batch_size]
                conditional = away + sampling.guidance_scale * (conditional - away)
            codes = draw_code(conditional / sampling.temperature, uniform).repeat(halves)
        if progress is not None:
            progress(index + 1, steps)
        return codes

    away = cond.unconditional() if negative is None else negative
    codes = model.generate(away.cat(cond) if is_guided else cond, choose)
    return codes[-cond.batch_size :]


def draw_code(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(B,) codes at the quantiles `uniform` (B,) in [0, 1) of the distributions of `logits` (B, N).

    Codes are in the order of what they mean, so that quantiles above one half are the upper half of the distribution.
    """
    cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
    codes = torch.searchsorted(cumulative, uniform.double()[:, None], right=True)[:, 0]
    return codes.clamp(max=logits.shape[1] - 1)
