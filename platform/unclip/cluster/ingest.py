"""Pictures and captions from anywhere into training-ready shards: judged, without duplicates, and every row accounted for.

Four steps, each of tasks whose results are files: parts of the sources are read and judged; duplicates are found from
hashes; shards are written from what was staged; and a quarantine of all other rows. Files appear whole, those that are
there are not made again, and what a file holds does not depend on who makes it or when: so a killed job goes on with the
same command and ends with the same bytes. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import ray
from pydantic import Field

from unclip.cluster import autoscaler, ingest_tasks, preflight, session, tasks
from unclip.cluster.ingest_tasks import Block, Facts, NumberedPart, Work
from unclip.cluster.preflight import Demand, Node
from unclip.cluster.prometheus import JobProgress
from unclip.cluster.room import wait_for_nodes
from unclip.config.base import Config, ConfigError
from unclip.data.ingest.duplicates import DuplicatePolicy, find_duplicates
from unclip.data.ingest.quarantine import QUARANTINE_FOLDER
from unclip.data.ingest.records import RecordPolicy
from unclip.data.ingest.shards import Piece, ShardPolicy, plan_shards, records_sha256
from unclip.data.ingest.staging import PART_BITS, ROW_BITS, SOURCE_BITS, WORK_FOLDER, record_schema
from unclip.data.manifest import FACTS_FILE, DataError
from unclip.data.sources import SourceConfig
from unclip.utils import storage
from unclip.utils.progress import progress_bar

SCHEMA_VERSION = 1
_PLAN = "plan.json"
_TASK = Demand(1, Node(1.0, 0.0), who="tasks")
_WAIT_S = 1800.0
"""Longest wait for a first CPU, where an autoscaler has to bring it."""
_DUPLICATES = {"duplicate": "duplicates", "near_duplicate": "near_duplicates"}
"""What the counts call rows that are left out for these reasons; all others are quarantined."""


class IngestConfig(Config):
    """Which pictures and captions become records, and where."""

    sources: tuple[SourceConfig, ...] = ()
    """Parquet, WebDataset tars, folders and URL lists, in the order of the records; required."""
    out: str = ""
    """Folder for the records: empty, or one where this job was begun; required."""
    records: RecordPolicy = RecordPolicy()
    """Which rows are kept, and how."""
    duplicates: DuplicatePolicy = DuplicatePolicy()
    """Which of these are the same picture."""
    shards: ShardPolicy = ShardPolicy()
    """How large the files are."""
    tasks: int = Field(default=0, ge=0)
    """Tasks that run at once, one CPU each; 0 for as many as the cluster has CPUs, or has by and by: where an autoscaler adds
    nodes for what waits, it doubles them up to its limit."""


def run_ingest(config: IngestConfig, *, dry_run: bool = False) -> Facts:
    """Makes what is missing and returns the manifest; a dry run checks everything and returns `parts` and `columns`.

    Raises `ConfigError`, `DataError`, `PreflightError` or `OSError` before anything is claimed; later `DataError` or
    `OSError` where a source cannot be read: the same command goes on from there.
    """
    config = _absolute(config)
    parts, work = _prepare(config)
    identity = _identity(config, parts)
    manifest = _check_out(config.out, identity)
    if dry_run:
        if session.joins_cluster():
            with session.session():
                _check_cluster()
        names = [f"{work.sources[part.source].uri}: {part.part.name}" for part in parts]
        return {"parts": names, "columns": _columns(work)}
    if manifest is None:
        with session.session():
            _check_cluster()
            wait_for_nodes(_TASK, wait_s=_WAIT_S)
            storage.write_json(work.folder(_PLAN), identity)
            with closing(JobProgress("ingest", config.out)) as gauges:
                manifest = identity | _Steps(config, work, gauges).run(parts)
        storage.write_json(storage.join(config.out, FACTS_FILE), manifest)
    _clean(config.out)
    return manifest


def _check_cluster() -> None:
    """Tasks wait for their turn, but for a CPU that no node has, or will have, they would wait without end."""
    if not any(node.cpus >= 1 for node in preflight.cluster_nodes()) and not autoscaler.grows():
        raise preflight.PreflightError("the cluster has no CPU: tasks need nodes that declare one")


def _absolute(config: IngestConfig) -> IngestConfig:
    """The settings with addresses that mean the same on every node; `ConfigError` where one is missing."""
    for field in ("sources", "out"):
        if not getattr(config, field):
            raise ConfigError(f"{field}: required, but not given")
    if len(config.sources) >= 1 << SOURCE_BITS:
        raise ConfigError(f"sources: {len(config.sources)} of them, at most {(1 << SOURCE_BITS) - 1} are possible")
    for source in config.sources:
        if source.kind == "folder" and storage.lies_in(config.out, source.uri):
            raise ConfigError(
                f"out = {config.out!r}: lies in the source folder {source.uri!r}, all files of which are read"
            )
    sources = [source.to_dict() | {"uri": storage.absolute(source.uri)} for source in config.sources]
    return config.merged({"sources": sources, "out": storage.absolute(config.out)})


def _prepare(config: IngestConfig) -> tuple[list[NumberedPart], Work]:
    """The parts of all sources, and what their tasks need to know."""
    sources = [source.build() for source in config.sources]
    uris = [source.uri for source in config.sources]
    schema = record_schema(zip(uris, (source.schema() for source in sources), strict=True), config.records)
    parts: list[NumberedPart] = []
    for index, source in enumerate(sources):
        found = source.parts()
        if len(found) > 1 << PART_BITS:
            raise DataError(f"source {uris[index]!r} has {len(found)} parts, more than {1 << PART_BITS}")
        # Ids that sources bring are mostly small: counted ones beside them begin above.
        first = (index + _has_own_ids(config)) << (PART_BITS + ROW_BITS)
        parts += [NumberedPart(index, part, len(parts) + i, first + (i << ROW_BITS)) for i, part in enumerate(found)]
    return parts, Work(config.out, config.sources, config.records, config.shards, schema)


def _has_own_ids(config: IngestConfig) -> bool:
    return any(source.id_column is not None for source in config.sources)


def _identity(config: IngestConfig, parts: Sequence[NumberedPart]) -> Facts:
    """What decides every byte of the output."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("out", "tasks")}
    listing = [[part.source, repr(part.part)] for part in parts]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return {"schema_version": SCHEMA_VERSION, "config": settings, "sources_sha256": digest}


def _check_out(out: str, identity: Facts) -> Facts | None:
    """The manifest, where the job has been done; refuses a folder that holds anything but this job's files."""
    for name, state in ((FACTS_FILE, "finished"), (f"{WORK_FOLDER}/{_PLAN}", "unfinished")):
        if not storage.exists(storage.join(out, name)):
            continue
        found = storage.read_json(storage.join(out, name))
        changed = [field for field, value in identity.items() if found.get(field) != value]
        if changed:
            raise ConfigError(
                f"out = {out!r}: holds {state} records of {_what_differs(found, identity)}; choose another folder, "
                "go back to what they were made of, or delete the folder to begin anew"
            )
        return found if state == "finished" else None
    if any(name != WORK_FOLDER and not storage.is_probe(name) for name in storage.names(out)):
        raise ConfigError(f"out = {out!r}: holds files that this job did not make; choose an empty folder")
    storage.check_writable(out)
    return None


def _what_differs(found: Facts, identity: Facts) -> str:
    if found.get("schema_version") != identity["schema_version"]:
        return "another version of this format"
    before, now = found.get("config", {}), identity["config"]
    changed = [name for name in now if before.get(name) != now[name]]
    return f"other settings: {', '.join(changed)}" if changed else "sources that have changed since"


def _clean(out: str) -> None:
    """Removes the work in progress, and what killed tasks left half written."""
    for folder in (out, storage.join(out, QUARANTINE_FOLDER)):
        for name in storage.names(folder):
            if name.endswith(".tmp") or storage.is_probe(name):
                storage.remove(storage.join(folder, name))
    storage.remove(storage.join(out, WORK_FOLDER))


def _columns(work: Work) -> dict[str, str]:
    return {field.name: str(field.type) for field in work.schema}


class _Steps:
    """The steps, on the connected cluster; each passes over what has been committed."""

    def __init__(self, config: IngestConfig, work: Work, gauges: JobProgress) -> None:
        self._config = config
        self._work = work
        self._shared = ray.put(work)
        self._gauges = gauges

    def run(self, parts: list[NumberedPart]) -> Facts:
        """The manifest, but for what was known before."""
        judged = self._judge(parts)
        blocks = ingest_tasks.blocks_of(parts, judged)
        closed = self._find_duplicates(blocks, sum(facts["kept"] for facts in judged))
        shards = self._write_shards(blocks, closed)
        quarantine = self._quarantine(blocks)
        counts = _counts(judged, closed)
        _check_counts(counts, shards, quarantine)
        return {
            "rows": counts["kept"],
            "counts": counts,
            "columns": _columns(self._work),
            "records_sha256": records_sha256(shards),
            "shards": shards,
            "quarantine": quarantine,
        }

    def _judge(self, parts: list[NumberedPart]) -> list[Facts]:
        ledger = self._ledger("judged")
        todo = {part.name: (part,) for part in parts if part.name not in ledger.facts}
        rows = 0
        with progress_bar(len(parts), "part", done=len(parts) - len(todo), title="read and judge") as bar:

            def show(facts: Facts) -> None:
                nonlocal rows
                rows += facts["rows"]
                speed = rows / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rows} rows, {speed:.0f} rows/s", refresh=False)
                bar.update()

            self._commit(ledger, ingest_tasks.judge_part, todo, show)
        return [ledger.facts[part.name] for part in parts]

    def _find_duplicates(self, blocks: list[Block], rows: int) -> list[Facts]:
        ledger = self._ledger("closed")
        todo = [block.name for block in blocks if block.name not in ledger.facts]
        with progress_bar(len(blocks), "block", done=len(blocks) - len(todo), title="find duplicates") as bar:
            removed = self._removed(blocks, rows) if todo else []
            arguments = {block.name: (block, table) for block, table in zip(blocks, removed, strict=bool(todo))}
            self._commit(
                ledger, ingest_tasks.close_block, {name: arguments[name] for name in todo}, lambda _: bar.update()
            )
        return [ledger.facts[block.name] for block in blocks]

    def _removed(self, blocks: list[Block], rows: int) -> list[ray.ObjectRef]:
        read = ray.remote(ingest_tasks.hashes_of_block).options(num_cpus=1)
        removed: list[ray.ObjectRef] = find_duplicates(
            [read.remote(self._shared, block) for block in blocks],
            self._config.duplicates,
            tasks.shuffle,
            rows=rows,
            starts=np.array([block.parts[0][0] << ROW_BITS for block in blocks]),
            has_own_ids=_has_own_ids(self._config),
        )
        return removed

    def _write_shards(self, blocks: list[Block], closed: list[Facts]) -> list[Facts]:
        shards = plan_shards((Piece(*piece) for facts in closed for piece in facts["pieces"]), self._config.shards)
        ledger = self._ledger("shards")
        todo = {
            shard.file: (shard, ingest_tasks.blocks_in(shard, blocks))
            for shard in shards
            if shard.file not in ledger.facts
        }
        done = sum(shard.rows for shard in shards if shard.file not in todo)
        with progress_bar(sum(shard.rows for shard in shards), "row", done=done, title="write shards") as bar:
            self._commit(ledger, ingest_tasks.make_shard, todo, lambda facts: bar.update(facts["rows"]))
        return [ledger.facts[shard.file] for shard in shards]

    def _quarantine(self, blocks: list[Block]) -> list[Facts]:
        ledger = self._ledger("quarantined")
        todo = {block.name: (block,) for block in blocks if block.name not in ledger.facts}
        with progress_bar(len(blocks), "block", done=len(blocks) - len(todo), title="quarantine") as bar:
            self._commit(ledger, ingest_tasks.quarantine_block, todo, lambda _: bar.update())
        return [file for block in blocks for file in ledger.facts[block.name]["files"]]

    def _at_once(self) -> int:
        """As many again as run wait, which keeps CPUs busy and is what an autoscaler adds nodes for."""
        return self._config.tasks or max(2, 2 * int(ray.cluster_resources().get("CPU", 0)))

    def _ledger(self, name: str) -> tasks.Ledger:
        return tasks.Ledger(self._work.folder(name))

    def _commit(
        self,
        ledger: tasks.Ledger,
        function: Callable[..., Facts],
        arguments: Mapping[str, tuple[Any, ...]],
        on_done: Callable[[Facts], object],
    ) -> None:
        shared = {name: (self._shared, *values) for name, values in arguments.items()}
        expected = len(ledger.facts) + len(shared)

        def show(facts: Facts) -> None:
            on_done(facts)
            self._gauges.show(len(ledger.facts), expected)

        ledger.run(function, shared, at_once=self._at_once, on_done=show)


def _counts(judged: Sequence[Facts], closed: Sequence[Facts]) -> Facts:
    """`rows_in` = `kept` + the sum of `quarantined` + `duplicates` + `near_duplicates`."""
    removed, quarantined = Counter[str](), Counter[str]()
    for facts in closed:
        removed.update(facts["removed"])
    for facts in judged:
        quarantined.update(facts["rejected"])
    quarantined.update({reason: rows for reason, rows in removed.items() if reason not in _DUPLICATES})
    return {
        "rows_in": sum(facts["rows"] for facts in judged),
        "kept": sum(facts["kept"] for facts in judged) - removed.total(),
        "quarantined": dict(sorted(quarantined.items())),
        **{name: removed[reason] for reason, name in _DUPLICATES.items()},
    }


def _check_counts(counts: Facts, shards: Sequence[Facts], quarantine: Sequence[Facts]) -> None:
    """Compares the counts with the rows that are in the files: a difference is a fault of ours."""
    elsewhere = sum(counts["quarantined"].values()) + counts["duplicates"] + counts["near_duplicates"]
    written = [sum(file["rows"] for file in files) for files in (shards, quarantine)]
    if written != [counts["kept"], elsewhere] or sum(written) != counts["rows_in"]:
        raise AssertionError(f"{written} rows in shards and quarantine do not fit the counts {counts}")
