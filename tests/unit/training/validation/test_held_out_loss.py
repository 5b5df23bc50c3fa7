"""Held-out losses against brute force: the objective's own loss, drawn often, and closed forms in t."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.support.objectives import Batch, T, build, decoder, make_batch, prior, upsampler
from torch import nn

from unclip.config.resources import ResourcesConfig
from unclip.recipes.clip import tiny_architecture
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.base import BaseObjectiveConfig, DiffusionObjective
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.optim import OptimizerConfig
from unclip.training.validation.config import ValidationConfig
from unclip.training.validation.held_out_loss import bucket_bounds, held_out_loss, stratified_timesteps
from unclip.training.validation.records import HeldOut
from unclip.utils.random import SampleGenerator


class Records(HeldOut):
    """Rows of a batch in the places of the held-out records, which would have to be pictures otherwise."""

    def __init__(self, batch: Batch) -> None:  # takes no folder
        self.count = len(batch["id"])
        self._batch = batch | {"position": torch.arange(self.count)}

    def batches(self, size: int, *, stop: int | None = None) -> Iterator[Batch]:
        for start in range(0, self.count if stop is None else stop, size):
            yield {name: column[start : start + size] for name, column in self._batch.items()}


def settings(objective: Any, *, microbatch: int = 7, workers: int = 1) -> TrainConfig:
    return TrainConfig(
        stage=objective.stage_config().kind,
        recipe="test",
        run="run",
        data=TrainDataConfig(path="data"),
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1.0),
        zero=ZeroConfig(),
        loop=LoopConfig(max_steps=1, global_batch_size=microbatch * workers, microbatch_size=microbatch),
        resources=ResourcesConfig(num_workers=workers),
        validation=ValidationConfig(seed=5),
    )


def repeated(count: int) -> Batch:
    """One record, many times: the mean over draws of its loss is then the expectation alone."""
    return {name: column.repeat_interleave(count, dim=0) for name, column in make_batch(1).items()}


class OfTime(nn.Module):
    """Answers the share of the timestep among all, whatever it sees: its error in x_start is known for each t."""

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return (timesteps / T).view(-1, *[1] * (x_t.ndim - 1)).expand_as(x_t)


@pytest.mark.parametrize("config", [prior(), decoder(variance_type="fixed_large"), upsampler()])
@torch.no_grad()
def test_the_mean_is_the_expectation_of_the_training_loss(config: BaseObjectiveConfig) -> None:
    """Of one record: against the objective's own loss over many other draws of t, noise and drops, to 5 deviations."""
    objective, count = build(config), 1500
    found = held_out_loss(settings(config, microbatch=500), objective, Records(repeated(count)))
    draws = repeated(count)
    losses = []
    for start in range(0, count, 500):
        streams = SampleGenerator.for_samples(77, torch.arange(start, start + 500))
        timesteps = streams.child("t of the truth").integers(T)
        rows = {name: column[:500] for name, column in draws.items()}
        losses.append(objective.losses(objective.model, rows, streams, timesteps)["loss"])
    loss = torch.cat(losses)
    brute = objective.loss(objective.model, draws, SampleGenerator.for_samples(78, torch.arange(count))).loss
    tolerance = 5 * float(loss.std()) / count**0.5 * 2**0.5
    assert found["loss"] == pytest.approx(float(loss.mean()), abs=tolerance)
    assert found["loss"] == pytest.approx(float(brute), abs=tolerance)
    assert tolerance < 0.3 * found["loss"]


@torch.no_grad()
def test_buckets_hold_the_loss_of_their_timesteps() -> None:
    """The squared error of an answer t/T is known for every t; what is left is where in its bucket a record's t fell."""
    config = prior()
    objective = build(config)
    assert isinstance(objective, DiffusionObjective)
    objective.model = OfTime()
    batch = repeated(600)
    found = held_out_loss(settings(config, microbatch=64), objective, Records(batch))
    x_start, _ = objective.inputs(batch, SampleGenerator.for_samples(0, torch.arange(600)))
    exact = torch.stack([(x_start[0] - t / T).square().mean() for t in range(T)])
    names = [name for name in found if name.startswith("loss_t")]
    assert names == [f"loss_t{5 * index:02d}-{5 * index + 4:02d}" for index in range(10)]
    for index, name in enumerate(names):
        inside = exact[5 * index : 5 * index + 5]
        tolerance = 5 * float(inside.std()) / 60**0.5
        assert found[name] == pytest.approx(float(inside.mean()), abs=tolerance)
        assert tolerance < 0.5 * float(exact.max() - exact.min())
    assert found["loss"] == pytest.approx(sum(found[name] for name in names) / 10, rel=1e-6)


def test_every_timestep_of_a_bucket_is_as_likely_and_none_is_outside() -> None:
    """23 timesteps in 4 buckets of 5 or 6: each bucket has its quarter of the records, each timestep its share."""
    records = torch.arange(40_000)
    timesteps = stratified_timesteps(23, 4, records, SampleGenerator.for_samples(0, records))
    bounds = bucket_bounds(23, 4)
    assert bounds == [(0, 5), (5, 11), (11, 17), (17, 23)]
    for bucket, (start, stop) in enumerate(bounds):
        counts = torch.bincount(timesteps[records % 4 == bucket], minlength=23)
        assert counts[:start].sum() == counts[stop:].sum() == 0
        expected = 10_000 / (stop - start)
        assert (counts[start:stop] - expected).abs().max() < 5 * expected**0.5


@torch.no_grad()
def test_neither_the_batches_nor_the_number_of_records_change_what_a_record_draws() -> None:
    config = decoder()
    objective, batch = build(config), make_batch(20)
    by_size = [held_out_loss(settings(config, microbatch=size), objective, Records(batch)) for size in (1, 7, 20)]
    for other in by_size[1:]:
        assert other.keys() == by_size[0].keys()
        assert all(other[name] == pytest.approx(value, rel=1e-4) for name, value in by_size[0].items())
    again = held_out_loss(settings(config, microbatch=7), objective, Records(batch))
    assert again == by_size[1]


@torch.no_grad()
def test_contrastive_losses_are_those_of_whole_batches_of_all_workers() -> None:
    config = ClipObjectiveConfig(architecture=tiny_architecture())
    objective = build(config)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 400, (9, 16), generator=random, dtype=torch.int32)
    tokens[:, -1] = 49407
    image = torch.randint(256, (9, 32, 32, 3), generator=random, dtype=torch.uint8)
    batch = {"id": torch.arange(9), "image": image, "tokens": tokens}
    found = held_out_loss(settings(config, microbatch=2, workers=2), objective, Records(batch))
    streams = SampleGenerator.for_samples(0, torch.arange(4))
    halves = [{name: column[rows] for name, column in batch.items()} for rows in (slice(0, 4), slice(4, 8))]
    losses = [float(objective.loss(objective.model, half, streams).loss) for half in halves]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)  # the ninth record has no batch of four
    assert set(found) == {"loss", "accuracy"}
