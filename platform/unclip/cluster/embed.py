"""Frozen CLIP embeddings beside the records: the same shards with `image_embed` and `text_embed`, by a pool of CLIPs.

CPU tasks read and decode row groups, CLIP actors embed them, CPU tasks write each as a part; a shard whose parts are all
there is put together under its old name, with its old row groups. Parts and shards appear whole or not at all, so running
the job again does what is missing. Last comes the manifest, with the CLIP's identity and the statistics of z_i.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import Field
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from unclip.cluster import preflight, session, stream
from unclip.config.base import Config, ConfigError
from unclip.config.resources import ResourcesConfig
from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.embedding import EmbeddingStatistics
from unclip.data.manifest import FACTS_FILE, DataError, Manifest, read_slices, scan
from unclip.training.setup import absolute_clip, load_clip_named
from unclip.utils import storage
from unclip.utils.progress import progress_bar

COLUMNS = ("image_embed", "text_embed")
_PARTS = "_parts"
_MARKER = "_embedding.json"
_PER_TASK = 16
"""Row groups that one task decodes, one after the other."""
_STATISTICS = b"unclip.image_embed"


class EmbedConfig(Config):
    """Which records to embed with which CLIP."""

    data: str = ""
    """Folder of Parquet shards with `id`, `image` and `caption`, local or `s3://`; required."""
    out: str = ""
    """Folder for the same shards with the embeddings beside; required."""
    clip: str = ""
    """An open_clip name, `hf-hub:…`, or the folder of an exported `clip` stage; required."""
    actors: int = Field(default=1, ge=1)
    """CLIPs that work at once."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 runs it on one CPU."""
    data_cpus: int = Field(default=1, ge=1)
    """Tasks that decode at once, and that write."""


@dataclass(frozen=True)
class _Plan:
    """What every task needs to know."""

    manifest: Manifest
    out: str
    spec: BatchSpec

    def part(self, fragment: int) -> str:
        """Where the embedded rows of a row group go before its shard is put together."""
        source = self.manifest.fragments[fragment]
        return storage.join(self.out, _PARTS, f"{source.file}.{source.row_group:05d}.parquet")

    def fragments_of(self, file: str) -> list[int]:
        return [index for index, fragment in enumerate(self.manifest.fragments) if fragment.file == file]


def run_embed(config: EmbedConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Embeds what is missing and returns the manifest.

    Raises `ConfigError`, `DataError`, `PreflightError` or `OSError` before anything is claimed; `DataError` where the
    output does not have exactly the input's rows.
    """
    for field in ("data", "out", "clip"):
        if not getattr(config, field):
            raise ConfigError(f"{field}: required, but not given")
    config = config.merged({"clip": absolute_clip(config.clip)})
    manifest = scan(config.data, ("id", "image", "caption"))
    clip = load_clip_named(config.clip)
    facts = {"source": config.clip, "fingerprint": clip.fingerprint, "embed_dim": clip.embed_dim}
    spec = BatchSpec(
        clip_image_size=clip.image_size, clip_tokenizer=config.clip, clip_context_length=clip.context_length
    )
    plan = _Plan(manifest, storage.absolute(config.out), spec)
    _check_out(plan)
    resources = ResourcesConfig(
        cpus_per_worker=0.01, data_cpus=config.data_cpus, clip_actors=config.actors, clip_gpus=config.gpus, use_gpu="no"
    )
    if dry_run:
        preflight.check_without_claiming(resources, clip_in_stream=True)
        return {"rows": manifest.rows, "clip": facts}
    with session.session():
        preflight.check_resources(resources, clip_in_stream=True)
        _forget_other_clip(plan, facts)
        _embed_missing(config, plan)
    return _finish(plan, facts)


def _check_out(plan: _Plan) -> None:
    """Refuses a folder that holds anything but embeddings made here: it would be overwritten."""
    if storage.names(plan.out) and not storage.exists(storage.join(plan.out, _MARKER)):
        raise ConfigError(f"out = {plan.out!r}: holds files that this job did not make; choose an empty folder")
    storage.check_writable(plan.out)


def _forget_other_clip(plan: _Plan, facts: dict[str, Any]) -> None:
    """Removes what an earlier run made with another CLIP or of other records; marks the folder as this run's."""
    marker = storage.join(plan.out, _MARKER)
    identity = {
        "fingerprint": facts["fingerprint"],
        "data": plan.manifest.facts.get("records_sha256", plan.manifest.uri),
        "rows": plan.manifest.rows,
    }
    if storage.exists(marker) and storage.read_json(marker) == identity:
        return
    for name in storage.names(plan.out):
        storage.remove(storage.join(plan.out, name))
    storage.write_json(marker, identity)


def _embed_missing(config: EmbedConfig, plan: _Plan) -> None:
    files = sorted({fragment.file for fragment in plan.manifest.fragments})
    todo = [file for file in files if not storage.exists(storage.join(plan.out, file))]
    parts = set(storage.names(storage.join(plan.out, _PARTS)))
    wanted = [index for file in todo for index in plan.fragments_of(file)]
    missing = [index for index in wanted if plan.part(index).rsplit("/", 1)[-1] not in parts]
    rows_left = sum(plan.manifest.fragments[index].rows for index in missing)
    with progress_bar(rows_left, "row", title="embed") as bar:
        if missing:
            for result in _dataset(config, plan, missing).iter_rows():
                bar.update(result["rows"])
    assemble = ray.remote(_assemble).options(num_cpus=1)
    ray.get([assemble.remote(file, plan) for file in todo])
    storage.remove(storage.join(plan.out, _PARTS))


def _dataset(config: EmbedConfig, plan: _Plan, fragments: Sequence[int]) -> ray.data.Dataset:
    """One row for each row group that was embedded and written."""
    pool = stream.ClipPool(config.clip, config.actors, config.gpus)
    with ray.data.DataContext.current(stream.data_context()):
        tasks = [{"fragments": list(fragments[i : i + _PER_TASK])} for i in range(0, len(fragments), _PER_TASK)]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        dataset = dataset.map_batches(
            partial(_decode, plan=plan), batch_size=None, num_cpus=1, compute=TaskPoolStrategy(size=config.data_cpus)
        )
        dataset = dataset.map_batches(
            stream.ClipActor,
            fn_constructor_args=(pool,),
            batch_size=None,
            compute=ActorPoolStrategy(size=config.actors),
            **({"num_gpus": config.gpus} if config.gpus else {"num_cpus": 1}),
        )
        return dataset.map_batches(
            partial(_write, plan=plan),
            batch_size=None,
            num_cpus=0.01,  # beside the decoders, which keep their CPUs while they wait for the writers
            compute=TaskPoolStrategy(size=config.data_cpus),
        )


def _decode(tasks: Batch, plan: _Plan) -> Iterator[Batch]:
    """Row groups as CLIP wants them, one a row."""
    for fragment in tasks["fragments"][0]:
        rows = plan.manifest.fragments[int(fragment)].rows
        table = read_slices(plan.manifest, [(int(fragment), 0, rows)], plan.spec.columns())
        batch = make_batch(table, np.arange(rows), plan.spec, seed=0)
        yield {"fragment": np.array([fragment])} | {name: array[np.newaxis] for name, array in batch.items()}


def _write(units: Batch, plan: _Plan) -> Iterator[Batch]:
    """Each row group with its embeddings as a part; answers the number of rows."""
    for index, fragment in enumerate(units["fragment"]):
        rows = plan.manifest.fragments[int(fragment)].rows
        records = read_slices(plan.manifest, [(int(fragment), 0, rows)], plan.manifest.columns)
        if not np.array_equal(records.column("id").to_numpy(), units["id"][index]):
            raise DataError(f"{plan.manifest.uri!r} changed while it was embedded: row group {fragment} has other ids")
        for name in COLUMNS:
            column = _as_column(units[name][index])
            position = records.schema.get_field_index(name)
            records = records.remove_column(position) if position >= 0 else records
            records = records.append_column(name, column)
        with storage.local_target(plan.part(int(fragment))) as path:
            pq.write_table(records, path, compression="none", row_group_size=max(1, rows))
        yield {"rows": np.array([rows])}


def _as_column(vectors: np.ndarray[Any, Any]) -> pa.Array:
    """(B, D) float16 -> fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _assemble(file: str, plan: _Plan) -> None:
    """The shard from its parts, one row group each, with the statistics of its image embeddings in its metadata."""
    statistics, writer = EmbeddingStatistics(), None
    with storage.local_target(storage.join(plan.out, file)) as path:
        for fragment in plan.fragments_of(file):
            with storage.local_file(plan.part(fragment)) as part:
                table = pq.read_table(part)
            statistics.update(_vectors(table))
            writer = writer or pq.ParquetWriter(path, table.schema, compression="none")
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        assert writer is not None
        writer.add_key_value_metadata({_STATISTICS: json.dumps(statistics.to_dict()).encode()})
        writer.close()


def _vectors(table: pa.Table) -> np.ndarray[Any, Any]:
    column = table.column("image_embed").combine_chunks()
    values: np.ndarray[Any, Any] = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    return values


def _finish(plan: _Plan, clip: dict[str, Any]) -> dict[str, Any]:
    """Checks that every row is there, and writes the manifest: the mark that the folder is complete."""
    made = scan(plan.out, ("id", *COLUMNS))
    if [f.rows for f in made.fragments] != [f.rows for f in plan.manifest.fragments]:
        raise DataError(f"{plan.out!r} has {made.rows} rows for {plan.manifest.rows} in {plan.manifest.uri!r}")
    statistics = EmbeddingStatistics()
    for file in sorted({fragment.file for fragment in made.fragments}):
        fs, path = storage.filesystem(storage.join(plan.out, file))
        with fs.open(path, "rb") as stream_of_shard:
            stored = pq.read_metadata(stream_of_shard).metadata[_STATISTICS]
        statistics.merge(EmbeddingStatistics.from_dict(json.loads(stored)))
    source = {name: fact for name, fact in plan.manifest.facts.items() if name != "files"}
    facts = source | {
        "rows": made.rows,
        "clip": clip,
        "statistics": {"count": statistics.count, "mean": statistics.mean.tolist(), "std": statistics.std.tolist()},
    }
    storage.write_json(storage.join(plan.out, FACTS_FILE), facts)
    return facts
