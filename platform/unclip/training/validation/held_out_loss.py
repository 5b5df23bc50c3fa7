"""The objective's own loss on held-out records, and where on the way from noise to sample it arises."""

from __future__ import annotations

from itertools import pairwise

import torch

from unclip.training.config import TrainConfig
from unclip.training.objectives import Objective
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.noised_clip import NoisedClipObjectiveConfig
from unclip.training.validation.records import HeldOut
from unclip.utils.random import SampleGenerator

BUCKETS = 10
"""Ranges of timesteps, as equal as can be, whose losses are told apart."""
_BY_BUCKET = ("loss", "accuracy")


def held_out_loss(config: TrainConfig, objective: Objective, records: HeldOut) -> dict[str, float]:
    """Means of `objective.losses` over the records: `loss` and its metrics, each also by timestep, as `loss_t000-099`.

    Everything random (noise, timesteps, crops, degradations, dropped conditions) depends on `validation.seed` and the
    record alone, so two checkpoints differ by their weights only. Conditions are dropped as often as in training, so that
    `loss` estimates what the training loss does; dropout inside networks is off. Timesteps are stratified: record i draws
    one of bucket i modulo `BUCKETS`, and a mean weighs every bucket by its share of the timesteps.

    Contrastive losses compare as many pairs as in training, a micro-batch of all workers, where there are so many.
    """
    size, count = _batches(config, records.count)
    total = objective.num_train_timesteps
    buckets = min(BUCKETS, count, total or 1)
    rows: dict[str, list[torch.Tensor]] = {}
    for batch in records.batches(size, stop=count):
        streams = SampleGenerator.for_samples(config.validation.seed, batch["position"])
        timesteps = None
        if total is not None:
            timesteps = stratified_timesteps(total, buckets, batch["position"], streams.child("timestep"))
        for name, column in objective.losses(objective.model, batch, streams, timesteps).items():
            rows.setdefault(name, []).append(column.double())
    metrics: dict[str, float] = {}
    for name, columns in rows.items():
        metrics |= _means(name, torch.cat(columns), total, buckets)
    return metrics


def bucket_bounds(num_train_timesteps: int, buckets: int) -> list[tuple[int, int]]:
    """The first timestep of each bucket, and the first one behind it."""
    edges = [index * num_train_timesteps // buckets for index in range(buckets + 1)]
    return list(pairwise(edges))


def stratified_timesteps(
    num_train_timesteps: int, buckets: int, records: torch.Tensor, generator: SampleGenerator
) -> torch.Tensor:
    """(B,) int64: of each of `records` (B,) a timestep of bucket `record % buckets`, all of the bucket as likely."""
    bounds = torch.tensor(bucket_bounds(num_train_timesteps, buckets), device=records.device)
    start, stop = bounds[records % buckets].unbind(dim=1)
    return torch.minimum(start + (generator.uniform() * (stop - start)).long(), stop - 1)


def _batches(config: TrainConfig, count: int) -> tuple[int, int]:
    """Records that pass the network at once, and of how many in all: contrastive losses need whole batches."""
    size = min(count, config.microbatch_size)
    if not isinstance(config.objective, ClipObjectiveConfig | NoisedClipObjectiveConfig):
        return size, count
    size = min(count, config.microbatch_size * config.resources.num_workers)
    return size, count - count % size


def _means(name: str, column: torch.Tensor, total: int | None, buckets: int) -> dict[str, float]:
    """Of what record i, in bucket i modulo `buckets`, has shown."""
    if total is None:
        return {name: float(column.mean())}
    means = [float(column[index::buckets].mean()) for index in range(buckets)]
    bounds = bucket_bounds(total, buckets)
    overall = sum(mean * (stop - start) for mean, (start, stop) in zip(means, bounds, strict=True)) / total
    digits = len(str(total - 1))
    parts = {
        f"{name}_t{start:0{digits}}-{stop - 1:0{digits}}": mean
        for mean, (start, stop) in zip(means, bounds, strict=True)
    }
    return {name: overall} | (parts if name in _BY_BUCKET else {})
