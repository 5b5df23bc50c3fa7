"""A static batch: requests with settings of their own through a pipeline's stages, one stage after the other.

Each stage samples all of them in one call of `MixedSampling`. Who has fewer steps than others leaves the forward passes when
it is through, but waits for the slowest before the next stage, where all begin together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unclip.diffusion.samplers import MixedSampling, SamplingConfig
from unclip.generation.engine.request import Request
from unclip.pipelines.cascade import Cascade
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import PriorStage, StageName
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
from unclip.pipelines.stages.draws import best_draw, draws_of
from unclip.utils.random import SampleGenerator


@torch.no_grad()
def together(pipeline: Pipeline, requests: Sequence[Request]) -> Mapping[int, torch.Tensor]:
    """The pictures of captions by their side, uint8 (B, S, S, 3); all of the same `up_to`, from a diffusion prior."""
    batch = _Batch.of(pipeline, requests)
    prompts = [request.prompt or "" for request in requests]
    embed = batch.prior(prompts)
    decoder, streams = pipeline.decoder, batch.streams("decoder")
    told = pipeline.told(prompts)
    start = decoder.begin(embed, told.pop("tokens", None), streams, further=told)
    pictures = to_uint8(batch.run("decoder", decoder, start, streams))
    made = {pictures.shape[1]: pictures}
    for name, stage in pipeline.upsamplers.items():
        if name in batch.plans[0].sampling:
            streams = batch.streams(name)
            pictures = to_uint8(batch.run(name, stage, stage.begin(to_signed(pictures), streams), streams))
            made[pictures.shape[1]] = pictures
    return made


@dataclass(frozen=True)
class _Batch:
    pipeline: Pipeline
    plans: list[Cascade]
    seeds: torch.Tensor

    @classmethod
    def of(cls, pipeline: Pipeline, requests: Sequence[Request]) -> _Batch:
        plans = [pipeline.plan(request.options) for request in requests]
        return cls(pipeline, plans, torch.tensor([request.seed for request in requests]))

    def streams(self, name: StageName) -> SampleGenerator:
        return SampleGenerator.for_samples(0, self.seeds, self.pipeline.device).child(name)

    def prior(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, D) z_i."""
        stage = self.pipeline.prior
        assert isinstance(stage, PriorStage)
        z_t = self.pipeline.encode_text(prompts)
        tokens = self.pipeline.tokens(prompts, stage.config.model.context_length)
        rows, captions, streams = draws_of(z_t, tokens, self.streams("prior"), stage.config.num_draws)
        return best_draw(self.run("prior", stage, stage.begin(rows, captions, streams), streams), z_t)

    def run(self, name: StageName, stage: DiffusionStage, start: Start, streams: SampleGenerator) -> torch.Tensor:
        """All rows of a stage, of which a request may have several, in the order of `draws_of`."""
        configs = [plan.sampling[name] for plan in self.plans] * (len(start.x_T) // len(self.plans))
        sampling = MixedSampling([config for config in configs if isinstance(config, SamplingConfig)])
        return stage.finish(
            sampling.sample(stage.network, start.x_T, stage.process, streams, start.cond, prepare=stage.prepare)
        )
