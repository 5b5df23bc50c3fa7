"""Runs and embeddings in this process, without Ray: for many small ones, whose workers would take longer to start than to train.

The same loop on the same batches as `unclip.cluster.fit` has, the same files: either goes on with what the other began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedded_folder import EmbeddedFolder, write_part
from unclip.data.embedding import ClipEmbedStage, EmbeddingStatistics, clip_inputs
from unclip.data.manifest import SliceReader, read_slices, records_identity, scan
from unclip.pipelines.clips import load_clip_named
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, check_outputs, clip_facts, prepare_run

Batch = dict[str, torch.Tensor]


def train_here(
    config: TrainConfig, device: torch.device, *, on_step: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Trains, or goes on with, the run of one worker that `config` describes, and exports its stage; returns its summary.

    A run that is finished is not trained again. Raises what `prepare_run` raises, and `TrainingDiverged`.

    Args:
        device: where it is trained.
        on_step: called before each step with the number of steps that the run has done.
    """
    prepared = prepare_run(config)
    config, run = prepared.config, RunFolder(prepared.config.run)
    check_outputs(config)
    summary = run.summary_of(config.loop)
    if summary is None:
        run.open(config)
        trainer = Trainer(config, rank=0, device=device)
        newest = checkpoint.latest(run.checkpoints_uri)
        if newest is not None:
            trainer.resume(newest)
        batches = local_batches(prepared, start=trainer.clock.samples_seen)
        summary = trainer.train(_told(batches, trainer, on_step) if on_step else batches)
        summary["data"] = prepared.data_report(summary["samples_seen"])
        run.finish({name: value for name, value in summary.items() if name != "stopped"})
    if config.bundle is not None:
        publish(prepared)
    return summary


def local_batches(prepared: PreparedRun, *, rank: int = 0, world_size: int = 1, start: int = 0) -> Iterator[Batch]:
    """A worker's share of every global batch of the run from position `start` on, without end: what `cluster.stream` gives."""
    order, spec, config = prepared.order, prepared.spec, prepared.config
    share = config.loop.global_batch_size // world_size
    reader = SliceReader(prepared.manifests, spec.columns())
    index = order.chunk_of(start)
    while True:
        chunk = order.chunk(index)
        index += 1
        table = reader.read(chunk.slices).take(chunk.permutation)
        for first in range(0, chunk.rows, share):
            positions = chunk.positions[first : first + share]
            if positions[0] < start or (positions[0] // share) % world_size != rank:
                continue
            batch = make_batch(table.slice(first, share), positions, spec, config.seed)
            yield {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def embed_here(records: str, out: str, clip_source: str, *, text_states: bool = False, device: str = "cpu") -> str:
    """Writes the records of a folder with their embeddings by the CLIP `clip_source` into `out`, as jobs/embed.py does;
    returns `out`. A complete folder is kept."""
    clip = load_clip_named(clip_source)
    manifest = scan(records, ("id", "image", "caption"))
    identity = {
        "records": records_identity(manifest, in_place=True),
        "clip": clip.fingerprint,
        "text_states": text_states,
    }
    folder = EmbeddedFolder(manifest, out, identity)
    if folder.is_complete():
        return out
    spec = BatchSpec(**clip_inputs(clip, clip_source))
    stage = ClipEmbedStage(clip_source, device, text_states=text_states)
    stage.setup()
    folder.begin()
    statistics = EmbeddingStatistics(clip.embed_dim)
    for file, fragments in folder.shards.items():
        for unit in (unit for fragment in fragments for unit in folder.units(fragment)):
            table = read_slices(manifest, [unit], spec.columns())
            write_part(folder.uri, unit, stage.process(make_batch(table, np.arange(*unit[1:]), spec, seed=0)))
        folder.write_shard(file)
        statistics.merge(folder.statistics([file]))
    folder.finish(clip_facts(clip, clip_source, text_states=text_states), statistics)
    folder.clean()
    return out


def _told(batches: Iterator[Batch], trainer: Trainer, on_step: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        on_step(trainer.clock.step)
        yield batch
