"""A request on its way through the stages, and its rows: what of it is in a stage's batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from unclip.diffusion.respacing import inversion_pairs, step_pairs
from unclip.diffusion.samplers import SamplingConfig
from unclip.generation.engine.request import Picture, Request, Result, Ticket
from unclip.generation.engine.route import AnyStage, Stages
from unclip.pipelines.cascade import Cascade
from unclip.pipelines.options import AnySampling
from unclip.pipelines.pictures import to_uint8
from unclip.pipelines.stages import PriorStage, StageName
from unclip.pipelines.stages.diffusion_stage import DiffusionStage
from unclip.pipelines.stages.draws import best_draw
from unclip.utils.random import SampleGenerator


@dataclass(eq=False)
class Row:
    """One sample in one stage: a picture, or a draw of the prior.

    `pairs` are the (timestep, previous timestep) of its steps, of which it has taken `done`; none where a stage takes no
    steps that it could share. The rows of an inversion go upwards.
    """

    job: Job
    stage: StageName
    draw: int
    sampling: AnySampling
    pairs: list[tuple[int, int]]
    waiting_since: float
    done: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        """Of its next step."""
        return self.pairs[self.done]

    @property
    def makes_picture(self) -> bool:
        """Whether it ends as one: draws of the prior and inversions do not."""
        return self.stage != "prior" and self.job.request.inverts is None

    @property
    def steps_left(self) -> int:
        """That it still has to take in its stage."""
        return max(1, len(self.pairs)) - self.done

    @property
    def stream(self) -> SampleGenerator:
        """The sample's own, from its beginning."""
        stream = self.job.stream.child(self.stage)
        has_draws = self.stage == "prior" and self.pairs  # an autoregressive prior makes all draws of a caption itself
        return stream.child(f"draw {self.draw}") if has_draws else stream


@dataclass(eq=False)
class Job:
    """A request on its way: its stream (one sample), and what its stages have made so far."""

    ticket: Ticket
    route: Cascade
    stream: SampleGenerator
    submitted: float
    image_embed: torch.Tensor | None
    """(1, D) z_i."""
    low_res: torch.Tensor | None
    """uint8 (1, s, s, 3): what the next upsampler takes."""
    text_embed: torch.Tensor | None = None
    """(1, D) z_t, which the best draw is nearest to."""
    draws: dict[int, torch.Tensor] = field(default_factory=dict)
    images: dict[int, Picture] = field(default_factory=dict)
    x_T: torch.Tensor | None = None
    """(3, S, S) what an inversion found."""
    began: float | None = None
    waiting: int = 0
    """Of its rows, those that wait for a slot."""
    steps: int = 0
    """Taken in the stage that it is in, by all its rows together."""
    total: int = 0
    """Of these, until it is through the stage."""

    @classmethod
    def of(cls, ticket: Ticket, route: Cascade, device: torch.device, now: float) -> Job:
        """The request of `ticket`, which has done nothing yet."""
        request = ticket.request
        embed = None if request.image_embed is None else request.image_embed[None].to(device, torch.float32)
        # A copy of arrays, which may be read-only: those that come from other processes are.
        low_res = None if request.low_res is None else torch.tensor(request.low_res)[None].to(device)
        stream = SampleGenerator.for_samples(0, torch.tensor([request.seed]), device)
        return cls(ticket, route, stream, now, embed, low_res)

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def caption(self) -> str:
        """What is encoded for it."""
        return self.request.prompt or ""

    @property
    def deadline(self) -> float:
        timeout = self.request.timeout
        return float("inf") if timeout is None else self.submitted + timeout

    def rows(self, name: StageName, stages: Stages, now: float) -> list[Row]:
        """Its rows in stage `name`."""
        self.steps, self.total = 0, self.steps_in(name, stages)
        pairs, sampling = self._pairs(name, stages), self.route.sampling[name]
        return [Row(self, name, draw, sampling, pairs, now) for draw in range(_draws(stages.by_name[name]))]

    def steps_in(self, name: StageName, stages: Stages) -> int:
        """That it takes in stage `name`, all its rows together."""
        return _draws(stages.by_name[name]) * max(1, len(self._pairs(name, stages)))

    def _pairs(self, name: StageName, stages: Stages) -> list[tuple[int, int]]:
        """The steps of a row of it in stage `name`."""
        stage, sampling = stages.by_name[name], self.route.sampling[name]
        if not isinstance(stage, DiffusionStage) or not isinstance(sampling, SamplingConfig):
            return []
        total = stage.process.num_train_timesteps
        along = step_pairs if self.request.inverts is None else inversion_pairs
        return along(sampling.timesteps(total), total)

    def take(self, row: Row, output: torch.Tensor, stages: Stages) -> bool:
        """Takes what a stage made of one of its rows (1, ...); whether the stage is done with it."""
        if row.stage == "prior":
            return self._take_draw(row, output, stages)
        if self.request.inverts is not None:
            self.x_T = output[0].cpu()
            return True
        pixels = to_uint8(output)
        size = self.route.sizes[row.stage]
        known = self.request.known.get(size)
        if known is not None:
            pixels = known.select(slice(None), pixels.device).compose(pixels)
        # From 8 bits, as in training and in GLIDE: the next stage sees the picture that is handed out.
        self.images[size], self.low_res = pixels[0].cpu().numpy(), pixels
        return True

    def _take_draw(self, row: Row, output: torch.Tensor, stages: Stages) -> bool:
        stage = stages.by_name["prior"]
        if not isinstance(stage, PriorStage):
            self.image_embed = output
            return True
        self.draws[row.draw] = output
        if len(self.draws) < stage.config.num_draws:
            return False
        assert self.text_embed is not None
        drawn = torch.cat([self.draws[draw] for draw in sorted(self.draws)])
        self.image_embed = best_draw(drawn, self.text_embed)
        return True

    @property
    def settings(self) -> dict[str, Any]:
        """Plain JSON values of all that changes its picture, beside what it is made of, its seed and the precision."""
        negative = self.request.negative_prompt
        return self.route.settings | ({} if negative is None else {"negative_prompt": negative})

    def result(self, now: float) -> Result:
        """Of a request that is through its last stage."""
        began = now if self.began is None else self.began
        return Result(
            image_embed=None if self.image_embed is None else self.image_embed[0].cpu(),
            images=self.images,
            x_T=self.x_T,
            seed=self.request.seed,
            settings=self.settings,
            queue_seconds=began - self.submitted,
            seconds=now - self.submitted,
        )


def _draws(stage: AnyStage) -> int:
    """Samples of a request that a stage takes steps of."""
    return stage.config.num_draws if isinstance(stage, PriorStage) else 1
