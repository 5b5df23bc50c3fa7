"""Frozen CLIP embeddings beside the records: the same shards with further columns, by a pool of CLIPs.

CPU tasks read row groups and decode them unit by unit, CLIP actors embed units, CPU tasks write each one's embeddings;
as soon as a shard has all of its own it is put together. `EmbeddedFolder` is what makes that safe to interrupt at any
time. Last come the principal components, and the manifest with the CLIP's identity and the statistics of z_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from pydantic import Field
from ray.data import TaskPoolStrategy

from unclip.cluster import preflight, session, stream
from unclip.cluster.failures import data_errors
from unclip.cluster.prometheus import JobProgress
from unclip.cluster.room import wait_for_nodes
from unclip.config.base import Config, ConfigError
from unclip.config.resources import ResourcesConfig
from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.embedded_folder import UNIT_ROWS, EmbeddedFolder, part_name, write_part
from unclip.data.embedding import MICROBATCH, EmbeddingStatistics, clip_inputs
from unclip.data.manifest import FACTS_FILE, DataError, read_slices, records_identity, scan
from unclip.pipelines.clips import absolute_clip, load_clip_named
from unclip.training.setup import clip_facts
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_PER_TASK = 16
"""Row groups that one task decodes, one after the other."""
_MERGED_AT_ONCE = 64
"""Shards whose statistics one task merges."""


class EmbedConfig(Config):
    """Which records to embed with which CLIP."""

    data: str = ""
    """Folder of Parquet shards with `id`, `image` and `caption`, local or `s3://`; required."""
    out: str = ""
    """Folder for the same shards with the embeddings beside; required."""
    clip: str = ""
    """An open_clip name, `hf-hub:…`, or the folder of an exported `clip` stage; required."""
    text_states: bool = False
    """Adds the states of all tokens of CLIP's text encoder, which a decoder may take in place of a text transformer of its
    own: 2*L*S bytes a record, 118 kB of ViT-L/14."""
    actors: int = Field(default=1, ge=1)
    """CLIPs that work at once."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 runs it on one CPU."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes whose GPUs they may take: `{unclip/group: train}`; empty: all nodes."""
    microbatch: int = Field(default=MICROBATCH, ge=1, le=UNIT_ROWS)
    """Records that pass a CLIP at once."""
    data_cpus: int = Field(default=1, ge=1)
    """Tasks that decode at once, and that write."""


def run_embed(config: EmbedConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Embeds what is missing and returns the manifest.

    Raises `ConfigError`, `DataError`, `PreflightError` or `OSError` before anything is claimed; `DataError` naming shard
    and record where one cannot be decoded, or has embeddings that are not finite.
    """
    for field in ("data", "out", "clip"):
        if not getattr(config, field):
            raise ConfigError(f"{field}: required, but not given")
    config = config.merged({"clip": absolute_clip(config.clip)})
    manifest = scan(config.data, ("id", "image", "caption"))
    clip = load_clip_named(config.clip)
    facts = clip_facts(clip, config.clip, text_states=config.text_states)
    records = records_identity(manifest, in_place=True)
    identity = {"records": records, "clip": clip.fingerprint, "text_states": config.text_states}
    folder = EmbeddedFolder(manifest, storage.absolute(config.out), identity)
    is_complete = folder.is_complete()
    storage.check_writable(folder.uri)
    resources = ResourcesConfig(
        cpus_per_worker=0.01, data_cpus=config.data_cpus, clip_actors=config.actors, clip_gpus=config.gpus, use_gpu="no"
    ).merged({"node_labels": config.node_labels if config.gpus else {}})
    if dry_run:
        preflight.check_without_claiming(resources, clip_in_stream=True)
        return {"rows": manifest.rows, "clip": facts}
    if not is_complete:
        spec = BatchSpec(**clip_inputs(clip, config.clip))
        with session.session(), data_errors():
            preflight.check_resources(resources, clip_in_stream=True)
            demand = preflight.demand_of(resources, use_gpu=False, clip_in_stream=True)
            wait_for_nodes(demand, wait_s=resources.wait_s)
            _embed_missing(config, folder, spec)
            folder.finish(facts, _statistics(folder))
    folder.clean()
    scan(folder.uri, ("id", "image_embed", "text_embed"))  # refuses shards that have been changed since
    return dict(storage.read_json(storage.join(folder.uri, FACTS_FILE)))


def _embed_missing(config: EmbedConfig, folder: EmbeddedFolder, spec: BatchSpec) -> None:
    found = folder.begin()
    todo = {file: parts for file, parts in folder.shards.items() if folder.receipt_name(file) not in found}
    left = {file: set().union(*map(folder.parts, fragments)) - found for file, fragments in todo.items()}
    missing = [
        fragment for file, fragments in todo.items() for fragment in fragments if folder.parts(fragment) & left[file]
    ]
    rows_left = sum(folder.source.fragments[fragment].rows for fragment in missing)
    shards = _ShardWriters(folder, config.data_cpus)
    total = folder.source.rows
    with (
        progress_bar(total, "image", done=total - rows_left, title="embed") as bar,
        closing(JobProgress("embed", folder.uri)) as gauges,
    ):
        for file in todo:
            if not left[file]:
                shards.write(file)
        for part in _dataset(config, folder, spec, missing).iter_rows() if missing else ():
            bar.update(part["rows"])
            gauges.show(bar.n, total)
            file = folder.source.fragments[part["fragment"]].file
            left[file].discard(part["name"])
            if not left[file]:
                shards.write(file)
        shards.wait()


class _ShardWriters:
    """Puts shards together beside the embedding, at most `limit` at once."""

    def __init__(self, folder: EmbeddedFolder, limit: int) -> None:
        # Beside the decoders, which keep their CPUs while they wait for what comes behind them.
        self._task = ray.remote(_write_shard).options(num_cpus=0.01)
        self._folder = ray.put(folder)
        self._limit = limit
        self._running: list[ray.ObjectRef[None]] = []

    def write(self, file: str) -> None:
        if len(self._running) >= self._limit:
            self.wait(1)
        self._running.append(self._task.remote(self._folder, file))

    def wait(self, count: int | None = None) -> None:
        """Returns when `count` more are done, or all; raises what went wrong in them."""
        if self._running:
            done, self._running = ray.wait(self._running, num_returns=count or len(self._running))
            ray.get(done)


def _write_shard(folder: EmbeddedFolder, file: str) -> None:
    folder.write_shard(file)


def _dataset(
    config: EmbedConfig, folder: EmbeddedFolder, spec: BatchSpec, fragments: Sequence[int]
) -> ray.data.Dataset:
    """One row for each part that was written."""
    pool = stream.ClipPool(
        config.clip,
        config.actors,
        config.gpus,
        microbatch=config.microbatch,
        text_states=config.text_states,
        node_labels=config.node_labels,
    )
    context = stream.data_context()
    context.execution_options.preserve_order = False  # tasks of many units would wait for their turn
    with ray.data.DataContext.current(context):
        tasks = [{"fragments": list(fragments[i : i + _PER_TASK])} for i in range(0, len(fragments), _PER_TASK)]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        dataset = dataset.map_batches(
            partial(_decode, folder=folder, spec=spec),
            batch_size=None,
            num_cpus=1,
            compute=TaskPoolStrategy(size=config.data_cpus),
        )
        return stream.embed_units(dataset, pool).map_batches(
            partial(_write, uri=folder.uri),
            batch_size=None,
            num_cpus=0.01,  # beside the decoders, which keep their CPUs while they wait for the writers
            compute=TaskPoolStrategy(size=config.data_cpus),
        )


def _decode(tasks: Batch, folder: EmbeddedFolder, spec: BatchSpec) -> Iterator[Batch]:
    """Row groups as CLIP wants them, a unit in each row."""
    for fragment in map(int, tasks["fragments"][0]):
        source = folder.source.fragments[fragment]
        table = read_slices(folder.source, [(fragment, 0, source.rows)], spec.columns())
        for unit in folder.units(fragment):
            _, start, stop = unit
            try:
                batch = make_batch(table.slice(start, stop - start), np.arange(start, stop), spec, seed=0)
            except DataError as error:
                raise DataError(f"{storage.join(folder.source.uri, source.file)!r}: {error}") from error
            yield {"unit": np.array([unit])} | {name: array[np.newaxis] for name, array in batch.items()}


def _write(units: Batch, uri: str) -> Iterator[Batch]:
    """Keeps each unit's embeddings; answers with the part's name, its row group's number, and the number of rows."""
    for index, (fragment, start, stop) in enumerate(units["unit"].tolist()):
        unit = (fragment, start, stop)
        write_part(uri, unit, {name: array[index] for name, array in units.items()})
        yield {"name": np.array([part_name(unit)]), "fragment": np.array([fragment]), "rows": np.array([stop - start])}


def _statistics(folder: EmbeddedFolder) -> EmbeddingStatistics:
    """Of all image embeddings; merged in the order of the shards, so that every run gives the same bits."""
    files, shared = list(folder.shards), ray.put(folder)
    merge = ray.remote(_merged).options(num_cpus=0.01)
    groups = [files[i : i + _MERGED_AT_ONCE] for i in range(0, len(files), _MERGED_AT_ONCE)]
    first, *others = [merge.remote(shared, group) for group in groups]
    statistics: EmbeddingStatistics = ray.get(first)
    for other in others:
        statistics.merge(ray.get(other))
    return statistics


def _merged(folder: EmbeddedFolder, files: Sequence[str]) -> EmbeddingStatistics:
    return folder.statistics(files)
