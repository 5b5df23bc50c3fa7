"""An evaluation before and after its work: what is checked first, what is to be made, and what there is at the end.

>>> job = EvaluationJob.prepare(config)
>>> job.begin()
>>> for name, units in job.missing().items():
...     networks = job.subject.networks(name)
...     for network in networks:
...         network.setup("cpu")
...     for unit in job.prepare_units(name, units):
...         made = extract_all(networks, unit.inputs, config.microbatch)
...         job.write(name, unit.number, features_table(unit.ids, unit.captions, made))
>>> result = job.finish()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from unclip.config.base import ConfigError
from unclip.data.batches import Batch
from unclip.data.ingest.shards import write_tables
from unclip.evaluation.config import EvaluateConfig
from unclip.evaluation.feature_folder import Features
from unclip.evaluation.pictures import Unit
from unclip.evaluation.subject import Subject, check_given
from unclip.evaluation.subjects import subject_of
from unclip.utils import storage

SCHEMA_VERSION = 2
DRIVER_FILE = "_driver.json"
_PROTOCOL, _RESULT, _REPORT = "protocol.json", "result.json", "report.html"
_LIBRARIES = ("numpy", "open_clip_torch", "pillow", "torch", "torchvision")


class PreparedUnit(NamedTuple):
    """A unit as the networks want it.

    Args:
        number: of the unit.
        ids: (B,) int64.
        captions: B texts, None where there is none.
        inputs: arrays with B rows.
    """

    number: int
    ids: npt.NDArray[np.int64]
    captions: Sequence[str | None]
    inputs: Batch


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation whose inputs were all found right. Picklable.

    Args:
        config: with an absolute `out`.
        subject: what is judged.
        protocol: all that decides the numbers, as JSON values.
    """

    config: EvaluateConfig
    subject: Subject
    protocol: Mapping[str, Any]

    @classmethod
    def prepare(cls, config: EvaluateConfig) -> EvaluationJob:
        """Checks everything that can be checked before networks run; nothing is written that stays.

        Raises `ConfigError` for a bad field or an `out` that was begun with another protocol, `DataError` for records
        and `BundleError` for a bundle that cannot be read, `OSError` where `out` cannot be written.
        """
        check_given(config, ["out"])
        config = config.merged({"out": storage.absolute(config.out)})
        subject = subject_of(config)
        job = cls(config, subject, {"schema_version": SCHEMA_VERSION, **subject.protocol})
        storage.check_writable(config.out)
        job._check_same()
        return job

    @property
    def rows(self) -> int:
        """Records that networks see in this job."""
        return sum(records.rows for records in self.subject.sets.values())

    @property
    def counts(self) -> dict[str, int | None]:
        """Records of each set that is judged; None for one that was not given."""
        found = {name: self.protocol[name] for name in self.subject.roles}
        return {name: protocol and protocol["rows"] for name, protocol in found.items()}

    def result(self) -> dict[str, Any] | None:
        """What `finish` returned; None before."""
        uri = storage.join(self.config.out, _RESULT)
        return dict(storage.read_json(uri)) if storage.exists(uri) else None

    def begin(self) -> None:
        """Marks the folder as this job's."""
        if not storage.exists(storage.join(self.config.out, _PROTOCOL)):
            storage.write_json(storage.join(self.config.out, _PROTOCOL), dict(self.protocol))

    def missing(self) -> dict[str, list[Unit]]:
        """The units that no network has seen yet, of each set that has such."""
        sets, folders = self.subject.sets, self.subject.folders
        missing = {name: folders[name].missing(records.units) for name, records in sets.items()}
        return {name: units for name, units in missing.items() if units}

    def prepare_units(self, name: str, units: Sequence[Unit]) -> Iterator[PreparedUnit]:
        """Reads and decodes units of a set; `DataError` names the record that cannot be used."""
        for unit, table in self.subject.sets[name].read(units):
            ids, captions = table.column("id").to_numpy(), table.column("caption").to_pylist()
            yield PreparedUnit(unit.number, ids, captions, self.subject.inputs(name, unit, table))

    def write(self, name: str, number: int, table: pa.Table) -> None:
        """Keeps the `features_table` of a unit."""
        self.subject.folders[name].write(number, table)

    def finish(self) -> dict[str, Any]:
        """Once all units are there: judges, writes tables and page and, last, the result, which it returns."""
        judgement = self.subject.judge({name: self._gather(name) for name in self.subject.folders})
        result = {
            "protocol": dict(self.protocol),
            **self.counts,
            "metrics": dict(judgement.metrics),
            "versions": {library: version(library) for library in _LIBRARIES},
        }
        for name, table in judgement.tables.items():
            write_tables(storage.join(self.config.out, name), table.schema, [table])
        for said in self._attributions:
            judgement.page.note(said)
        judgement.page.heading("Protocol")
        judgement.page.table([(name, json.dumps(value)) for name, value in _leaves(self.protocol)])
        storage.write_bytes(storage.join(self.config.out, _REPORT), judgement.page.html().encode())
        storage.write_json(storage.join(self.config.out, _RESULT), result)
        return result

    @property
    def _attributions(self) -> list[str]:
        """What the licences of records want said where they are shown."""
        facts = [records.pictures.facts for records in self.subject.sets.values()]
        return list(dict.fromkeys(each["attribution"] for each in facts if each.get("attribution")))

    def _gather(self, name: str) -> Features:
        folder, sets = self.subject.folders[name], self.subject.sets
        if name in sets:
            folder.finish(sets[name], self.subject.folder_protocol(name))
        return folder.read([column for network in self.subject.networks(name) for column in network.columns])

    def _check_same(self) -> None:
        """Raises `ConfigError` where the folder was begun with another protocol, or is not an evaluation's."""
        out = self.config.out
        if not storage.exists(storage.join(out, _PROTOCOL)):
            if [name for name in storage.names(out) if name != DRIVER_FILE and not storage.is_probe(name)]:
                raise ConfigError(f"out = {out!r}: holds files that this job did not make; choose an empty folder")
            return
        found = storage.read_json(storage.join(out, _PROTOCOL))
        changed = [name for name in {**found, **self.protocol} if found.get(name) != self.protocol.get(name)]
        if changed:
            was, now = (json.dumps(protocol.get(changed[0])) for protocol in (found, self.protocol))
            raise ConfigError(
                f"out = {out!r}: was begun with {changed[0]} = {was}, now it is {now}; choose another folder, or delete "
                "this one"
            )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value by its dotted name."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value
