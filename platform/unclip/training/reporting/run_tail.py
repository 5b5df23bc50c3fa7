"""What a run's folder tells since it was last looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unclip.training.run_folder import RunFolder
from unclip.utils import storage

Record = Mapping[str, Any]
"""One line of a `….jsonl` file of the run folder."""


@dataclass(frozen=True)
class News:
    """Lines that came, oldest first."""

    records: tuple[Record, ...] = ()
    """Of `metrics.jsonl`; steps only grow."""
    validations: tuple[Record, ...] = ()
    """Of `validation.jsonl`; `samples` is the whole address of the picture, or None."""
    restarts: tuple[Record, ...] = ()
    """Of `restarts.jsonl`."""
    cost: Record | None = None
    """What `cost.json` says, where that has changed."""

    def __bool__(self) -> bool:
        return bool(self.records or self.validations or self.restarts or self.cost)


class RunTail:
    """Follows one run, local or on object storage, reading only what is new.

    Each step comes once, also where a restart trained it again: of lines that are found together the last one counts.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._metrics = _Lines(run.metrics_uri)
        self._validation = _Lines(run.validation_uri)
        self._restarts = _Lines(run.restarts_uri)
        self._cost: Record | None = None
        self._step = -1

    def look(self) -> News:
        """What came since the last call; the first one gives everything. Raises `OSError` where the store fails."""
        return News(
            restarts=tuple(self._restarts.new()),
            validations=tuple(self._with_address(record) for record in self._validation.new()),
            records=self._once(self._metrics.new()),
            cost=self._new_cost(),
        )

    def _new_cost(self) -> Record | None:
        try:
            cost: Record = storage.read_json(self._run.cost_uri)
        except (FileNotFoundError, json.JSONDecodeError):  # a damaged one is written anew
            return None
        if cost == self._cost:
            return None
        self._cost = cost
        return cost

    def _once(self, written: list[dict[str, Any]]) -> tuple[Record, ...]:
        records: list[Record] = []
        for record in written:
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            if record["step"] > self._step:
                records.append(record)
        if records:
            self._step = records[-1]["step"]
        return tuple(records)

    def _with_address(self, record: dict[str, Any]) -> Record:
        samples = record.get("samples")
        return record | {"samples": storage.join(self._run.uri, samples) if samples else None}


class _Lines:
    """The new whole lines of a file that `storage.append_line` lets grow: on object stores, a folder of parts."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._part = 0
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        parts = self._parts()
        for number in range(self._part, len(parts)):
            if number > self._part:
                self._part, self._offset = number, 0
            whole, _, _ = self._rest(parts[number]).rpartition(b"\n")
            if whole:
                self._offset += len(whole) + 1
                found += [json.loads(line) for line in whole.split(b"\n")]
        return found

    def _parts(self) -> list[str]:
        if storage.is_local(self._uri):
            return [self._uri] if storage.exists(self._uri) else []
        return [storage.join(self._uri, name) for name in storage.names(self._uri)]

    def _rest(self, part: str) -> bytes:
        if not storage.is_local(part):
            return storage.read_bytes(part)[self._offset :]  # a part has few lines; stores refuse an empty range
        fs, path = storage.filesystem(part)
        rest = fs.cat_file(path, start=self._offset)
        assert isinstance(rest, bytes)
        return rest
