"""The prompts of a job in units: what is made, committed and, after an interruption, made again together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.data.sources.base import StorageFile
from unclip.data.sources.listing import SourceFile, find_shards
from unclip.data.sources.lists import LIST_SUFFIXES, Record, divide, read_records
from unclip.generation.bulk.config import GenerateConfig

HASHED_BYTES = 64 * 2**20
"""From the beginning of each list: what is changed there is noticed, even where the size stays."""


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of one list.

    Args:
        index: its place among the units.
        first_row: number of its first row among those of all lists.
        rows: how many it has.
        uri: the list; None where there is just the one prompt of the configuration.
        start: number of its first row in the list, which begins at byte `offset` (0 in Parquet).
    """

    index: int
    first_row: int
    rows: int
    uri: str | None = None
    start: int = 0
    offset: int = 0

    @property
    def is_text(self) -> bool:
        """Whether its values are texts, whatever they mean: then numbers are read from them."""
        return self.uri is not None and self.uri.lower().endswith((".csv", ".tsv"))


@dataclass(frozen=True)
class PromptList:
    """All units of a job, and JSON values by which the same prompts are known again."""

    units: tuple[Unit, ...]
    identity: dict[str, Any]

    @property
    def rows(self) -> int:
        """Of all units."""
        return sum(unit.rows for unit in self.units)


def list_prompts(config: GenerateConfig) -> PromptList:
    """Counts the rows of every list; reads text lists whole, of Parquet the footer.

    Raises `ConfigError` where not exactly one of `prompt` and `prompts` is given, a table lacks the prompts' column, or
    there are no rows; `DataError` where a list does not exist or is not readable Parquet; `OSError` where its store fails.
    """
    if (config.prompt is None) == (config.prompts is None):
        raise ConfigError(f"prompt = {config.prompt!r}, prompts = {config.prompts!r}: give one of them")
    if config.prompts is None:
        return PromptList((Unit(0, 0, 1),), {"prompt": config.prompt})
    units: list[Unit] = []
    files: dict[str, dict[str, Any]] = {}
    rows = 0
    for file in _files(config.prompts):
        first_row = rows
        for start, stop, offset in divide(file.uri, config.prompts_per_shard):
            units.append(Unit(len(units), rows, stop - start, file.uri, start, offset))
            rows += stop - start
        files[file.name] = {"bytes": file.size, "rows": rows - first_row, "sha256": _hash(file)}
    if not rows:
        raise ConfigError(f"prompts = {config.prompts!r}: holds no prompts")
    _check_column(config, units)
    return PromptList(tuple(units), {"prompt_column": config.prompt_column, "files": files})


def read_unit(config: GenerateConfig, unit: Unit) -> Iterator[Record]:
    """The records of a unit, as many as it has rows; where the list breaks off, the rest are records with that problem.

    Raises `DataError` where the list has fewer rows than it had, and `OSError` where its store fails.
    """
    if unit.uri is None:
        yield Record(0, {config.prompt_column: config.prompt})
        return
    stop = unit.start + unit.rows
    records = read_records(unit.uri, unit.start, stop, unit.offset, line_field=config.prompt_column)
    for number in range(unit.start, stop):
        try:
            record = next(records, None)
        except DataError as error:
            yield from (Record(lost, {}, f"breaks before row {number}: {error}") for lost in range(number, stop))
            return
        if record is None:
            raise DataError(f"{unit.uri!r} ends before row {number}: it has changed since it was listed")
        yield record


def _files(uri: str) -> tuple[SourceFile, ...]:
    try:
        files = find_shards(uri, LIST_SUFFIXES)
    except DataError as error:
        raise ConfigError(f"prompts = {uri!r}: {error}") from None
    for file in files:
        if not file.name.lower().endswith(LIST_SUFFIXES):
            raise ConfigError(f"prompts = {file.uri!r}: does not end in {', '.join(LIST_SUFFIXES)}")
    return files


def _hash(file: SourceFile) -> str:
    digest = hashlib.sha256()
    with StorageFile(file.uri) as content:
        left = HASHED_BYTES
        while left and (block := content.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _check_column(config: GenerateConfig, units: list[Unit]) -> None:
    """Raises `ConfigError` where a table lacks the prompts' column; JSON objects may differ from line to line."""
    for uri in dict.fromkeys(unit.uri for unit in units):
        if uri is None or uri.lower().endswith((".jsonl", ".txt")):
            continue
        record = next((record for record in read_records(uri, 0, 1) if record.problem is None), None)
        if record is not None and config.prompt_column not in record.values:
            found = ", ".join(map(str, record.values))
            raise ConfigError(f"prompt_column = {config.prompt_column!r}: {uri!r} has no such column, but {found}")
