"""The rows that take their steps in one stage together: they come and go between any two steps.

A row comes out as it would alone. Every row has its sampler, its timesteps, its guidance scale and its noise; the forward
pass has one row for each condition, and a second one, without it, only for those that are guided at their timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch

from unclip.diffusion.guidance import Denoise, combine
from unclip.diffusion.process import per_sample
from unclip.diffusion.samplers import MixedSampling, Sampler, SamplerState, SamplingConfig
from unclip.generation.engine.job import Row
from unclip.generation.engine.steering import Steering, steer
from unclip.models.condition import Condition
from unclip.pipelines.guides import DecoderGuide, GuideName
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
from unclip.utils.random import SampleGenerator


@dataclass(frozen=True)
class Entry:
    """A row that may join: where it begins (one sample), the stream that its noise comes from, and what steers it."""

    row: Row
    sampling: SamplingConfig
    start: Start
    generator: SampleGenerator
    steering: Steering = field(default_factory=Steering)


@dataclass(frozen=True)
class _Seat:
    """What is kept of an `Entry` beside its tensors."""

    row: Row
    sampling: SamplingConfig
    steering: Steering


@dataclass(frozen=True)
class _Pass:
    """One forward pass over n rows of the batch, of which `guided` (g,) come a second time, unconditional.

    rows: (n + g + padding,) the batch's row of each row of the pass. cond: what each is told. scale: (g,) float64.
    """

    rows: torch.Tensor
    cond: Any
    guided: torch.Tensor
    scale: torch.Tensor


class Batch:
    """The running batch of a stage.

    Args:
        network: the stage's, or what was compiled of it.
        padded: the number of rows that a forward pass of so many rows shall have, itself or more.
        guides: what rows may be steered by.
    """

    def __init__(
        self,
        stage: DiffusionStage,
        network: Denoise[Any],
        device: torch.device,
        *,
        padded: Callable[[int], int],
        guides: Mapping[GuideName, DecoderGuide] = MappingProxyType({}),
    ) -> None:
        self._stage, self._network, self._device = stage, network, device
        self._padded, self._guides = padded, guides
        self.forward_rows = self.padding_rows = 0
        self.clear()

    def clear(self) -> None:
        """Drops all rows."""
        self._seats: list[_Seat] = []
        self._members: _Members | None = None
        self._pass: tuple[tuple[int, ...], _Pass] | None = None

    @property
    def rows(self) -> list[Row]:
        """In the order of the batch."""
        return [seat.row for seat in self._seats]

    def admit(self, entries: Sequence[Entry]) -> None:
        """Lets `entries` take part from the next step on; where that raises, the batch is what it was."""
        if not entries:
            return
        arrived = _Members.of(entries, self._stage)
        members = arrived if self._members is None else self._members.cat(arrived)
        seats = [_Seat(entry.row, entry.sampling, entry.steering) for entry in entries]
        self._change([*self._seats, *seats], members)

    def drop(self, rows: Collection[Row]) -> None:
        """Lets `rows` go."""
        staying = [place for place, seat in enumerate(self._seats) if seat.row not in rows]
        if not staying:
            self.clear()
        elif len(staying) < len(self._seats):
            assert self._members is not None
            self._change([self._seats[place] for place in staying], self._members.select(staying))

    def step(self) -> list[tuple[Row, torch.Tensor]]:
        """One step of every row; returns those that are done, and leave, with what the stage makes of them (1, ...)."""
        assert self._members is not None
        state, generator = self._members.state, self._members.generator
        now, before = torch.tensor([row.pair for row in self.rows]).to(self._device).unbind(dim=1)
        denoise: Denoise[Any] = self._forward
        for guide in self._guiding:
            denoise = guide(denoise)
        model_output = denoise(state.x_t, now, None).to(state.x_t.dtype)
        noise = generator.normal(tuple(state.x_t.shape[1:])).to(state.x_t.dtype) if self._sampler.stochastic else None
        self._members.state = self._sampler.step(self._stage.process, model_output, state, now, before, noise)
        for row in self.rows:
            row.done += 1
        return self._leave()

    def clean(self, row: Row) -> torch.Tensor:
        """(1, ...) the clean sample that `row`, on its way, was last predicted to become."""
        assert self._members is not None
        place = self.rows.index(row)
        return self._members.state.last_x_start[place : place + 1]

    def _leave(self) -> list[tuple[Row, torch.Tensor]]:
        assert self._members is not None
        places = [place for place, row in enumerate(self.rows) if row.done == len(row.pairs)]
        if not places:
            return []
        rows, ends = [self.rows[place] for place in places], self._members.state.x_t[places]
        outputs = self._stage.finish(ends)
        self.drop(rows)
        return [
            (row, (outputs if row.pairs[-1][1] < 0 else ends)[index : index + 1])  # an inversion's ends are no pictures
            for index, row in enumerate(rows)
        ]

    def _change(self, seats: list[_Seat], members: _Members) -> None:
        """Everything that depends on who is in the batch; attributes change last, together."""
        sampler = MixedSampling([seat.sampling for seat in seats]).sampler(self._device)
        guiding = steer([seat.steering for seat in seats], self._guides, self._stage.process)
        self._seats, self._members, self._pass = seats, members, None
        self._sampler: Sampler = sampler
        self._guiding = guiding

    def _forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, _: object) -> torch.Tensor:
        """The network's output for the batch (B, ...), each row with its own classifier-free guidance."""
        forward = self._current_pass()
        count, guided = len(x_t), len(forward.guided)
        output = self._network(x_t[forward.rows], timesteps[forward.rows], forward.cond).to(x_t.dtype)
        self.forward_rows += count + guided
        self.padding_rows += len(output) - count - guided
        conditional, unconditional = output[:count], output[count : count + guided]
        if not guided:
            return conditional
        combined = combine(
            unconditional,
            conditional[forward.guided],
            per_sample(forward.scale, unconditional),
            learned_variance=self._stage.process.config.variance_type == "learned_range",
        )
        return conditional.index_copy(0, forward.guided, combined)

    def _current_pass(self) -> _Pass:
        """Made anew only where other rows are guided than at the last step."""
        total = self._stage.process.num_train_timesteps
        guided = tuple(
            place for place, seat in enumerate(self._seats) if _is_guided(seat.sampling, seat.row.pair[0], total)
        )
        if self._pass is None or self._pass[0] != guided:
            self._pass = guided, self._make_pass(guided)
        return self._pass[1]

    def _make_pass(self, guided: tuple[int, ...]) -> _Pass:
        assert self._members is not None
        count, second = len(self._seats), self._members.second
        rows = [*range(count), *guided]
        told = [*range(count), *(count + second.index(place) for place in guided)]
        padding = self._padded(len(rows)) - len(rows)
        rows, told = rows + rows[:1] * padding, told + told[:1] * padding  # copies of a real row, never looked at
        cond = self._members.cond
        if told != list(range(count + len(second))):
            cond = cond.select(torch.tensor(told, device=self._device))
        scales = [self._seats[place].sampling.guidance_scale for place in guided]
        return _Pass(
            rows=torch.tensor(rows, device=self._device),
            cond=cond,
            guided=torch.tensor(guided, dtype=torch.int64, device=self._device),
            scale=torch.tensor(scales, dtype=torch.float64, device=self._device),
        )


@dataclass
class _Members:
    """The tensors of a batch's n rows: state, streams, and what the network is told, prepared once when a row joins.

    cond: n conditional rows, then of the rows `second`, which are guided at some of their steps, what they are led away from.
    """

    state: SamplerState
    generator: SampleGenerator
    cond: Any
    second: list[int]

    @classmethod
    def of(cls, entries: Sequence[Entry], stage: DiffusionStage) -> _Members:
        """Rows that have taken no step."""
        x_T = torch.cat([entry.start.x_T for entry in entries])
        cond = _cat([entry.start.cond for entry in entries])
        second = [place for place, entry in enumerate(entries) if entry.sampling.guidance_scale != 1]
        if second:
            cond = cond.cat(_cat([entries[place].start.away for place in second]))
        generator = reduce(SampleGenerator.cat, [entry.generator for entry in entries])
        return cls(SamplerState.start(x_T), generator, stage.prepare(cond), second)

    @property
    def count(self) -> int:
        return len(self.state.x_t)

    def cat(self, other: _Members) -> _Members:
        """These rows, then those of `other`."""
        mine, theirs = self.count, other.count

        def in_order(these: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
            return torch.cat([these[:mine], those[:theirs], these[mine:], those[theirs:]])

        cond = self.cond.map(in_order, other.cond)
        second = self.second + [self.count + place for place in other.second]
        return _Members(self.state.cat(other.state), self.generator.cat(other.generator), cond, second)

    def select(self, places: Sequence[int]) -> _Members:
        """The rows at `places`, which rise."""
        twice = [place for place in places if place in self.second]
        told = [*places, *(self.count + self.second.index(place) for place in twice)]
        rows = torch.tensor(places, device=self.state.x_t.device)
        cond = self.cond.select(torch.tensor(told, device=rows.device))
        second = [index for index, place in enumerate(places) if place in self.second]
        return _Members(self.state.select(rows), self.generator.select(rows), cond, second)


def _cat(conditions: Sequence[Condition]) -> Condition:
    first, *others = conditions
    return first.map(lambda *tensors: torch.cat(tensors), *others)


def _is_guided(sampling: SamplingConfig, timestep: int, num_train_timesteps: int) -> bool:
    start, stop = sampling.guided_timesteps(num_train_timesteps)
    return sampling.guidance_scale != 1 and start <= timestep < stop
