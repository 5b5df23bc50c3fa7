"""A trained judge: its networks, and what it knows of captions.

OUT/network-0.safetensors …  captions.parquet  config.json (what it was begun with)  judge.json (last)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.config.base import ConfigError
from unclip.data.ingest.shards import write_tables
from unclip.evaluation.judge.examples import UNKNOWN
from unclip.evaluation.judge.network import JudgeNetwork
from unclip.utils import storage

FACTS_FILE = "judge.json"
_CAPTIONS = "captions.parquet"
_KIND, _SCHEMA_VERSION = "attribute_judge", 1


@dataclass(frozen=True)
class KnownCaptions:
    """What M captions of real pictures say.

    Args:
        rows: the row of each caption.
        folds: (M,): the network that has seen no picture of the caption.
        stated: (M, attributes): positions in the classes, `UNKNOWN` where a caption does not say.
        right: (M, attributes + 1): the share of the caption's real pictures of which that network finds the attribute,
            and at the end all that are stated; NaN where none is.
    """

    rows: Mapping[str, int]
    folds: npt.NDArray[np.int64]
    stated: npt.NDArray[np.int64]
    right: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """The judge in a folder, without its networks. Picklable.

    Args:
        uri: of the folder, absolute.
        facts: what judge.json says.
    """

    uri: str
    facts: Mapping[str, Any]

    @classmethod
    def load(cls, field: str, uri: str) -> Judge:
        """`ConfigError` naming `field` where there is no judge, an unfinished one, or one whose files were changed."""
        uri = storage.absolute(uri)
        path = storage.join(uri, FACTS_FILE)
        facts = storage.read_json(path) if storage.exists(path) else {}
        if (facts.get("kind"), facts.get("schema_version")) != (_KIND, _SCHEMA_VERSION):
            raise ConfigError(f"{field} = {uri!r}: has no {FACTS_FILE} of jobs/train_judge.py, or is not finished")
        try:
            found = _digest(uri, facts["config"]["folds"])
        except OSError as error:
            raise ConfigError(f"{field} = {uri!r}: is not whole: {error}") from None
        if found != facts["sha256"]:
            raise ConfigError(f"{field} = {uri!r}: its files are not those that {FACTS_FILE} was written for")
        return cls(uri, facts)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Of each attribute."""
        return {name: tuple(classes) for name, classes in self.facts["classes"].items()}

    @property
    def image_size(self) -> int:
        return int(self.facts["config"]["image_size"])

    @property
    def fingerprint(self) -> str:
        """A hash of the networks and of what is known of captions."""
        return str(self.facts["sha256"])

    @cached_property
    def captions(self) -> KnownCaptions:
        with storage.local_file(storage.join(self.uri, _CAPTIONS)) as path:
            table = pq.read_table(path)
        stated = [
            [UNKNOWN if value is None else classes.index(value) for value in table.column(name).to_pylist()]
            for name, classes in self.classes.items()
        ]
        right = [table.column(f"{name}_right").to_numpy() for name in (*self.classes, "all")]
        rows = {caption: row for row, caption in enumerate(table.column("caption").to_pylist())}
        return KnownCaptions(rows, table.column("fold").to_numpy(), np.array(stated).T, np.array(right).T)

    def network(self, fold: int, device: str) -> nn.Module:
        """That which has not seen the pictures of a fold, for inference."""
        return load_network(self.uri, fold, self.classes, self.facts["config"]["width"]).to(device)


def network_file(fold: int) -> str:
    return f"network-{fold}.safetensors"


def save_network(uri: str, fold: int, network: JudgeNetwork) -> None:
    """Keeps a network as the judge's of a fold."""
    tensors = {name: tensor.contiguous() for name, tensor in network.cpu().state_dict().items()}
    with storage.local_target(storage.join(uri, network_file(fold))) as path:
        save_file(tensors, path)


def load_network(uri: str, fold: int, classes: Mapping[str, tuple[str, ...]], width: int) -> JudgeNetwork:
    """The network of a fold, for inference; `ConfigError` where the file is another network's."""
    network = JudgeNetwork([len(of_attribute) for of_attribute in classes.values()], width)
    with storage.local_file(storage.join(uri, network_file(fold))) as path:
        try:
            network.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{storage.join(uri, network_file(fold))!r} is not this judge's: {error}") from error
    return network.eval().requires_grad_(False)


def save_judge(uri: str, captions: KnownCaptions, facts: Mapping[str, Any]) -> Judge:
    """Writes what is known of captions and, last, judge.json; the networks are there.

    Args:
        facts: `classes`, `config`, and whatever else there is to tell.
    """
    classes: Mapping[str, list[str]] = facts["classes"]
    columns: dict[str, Any] = {"caption": pa.array(list(captions.rows), pa.string()), "fold": captions.folds}
    for index, (name, values) in enumerate(classes.items()):
        stated = [None if label == UNKNOWN else values[label] for label in captions.stated[:, index]]
        columns |= {name: pa.array(stated, pa.string()), f"{name}_right": captions.right[:, index]}
    table = pa.table(columns | {"all_right": captions.right[:, -1]})
    write_tables(storage.join(uri, _CAPTIONS), table.schema, [table])
    digest = _digest(uri, facts["config"]["folds"])
    known = {"kind": _KIND, "schema_version": _SCHEMA_VERSION, **facts, "sha256": digest}
    storage.write_json(storage.join(uri, FACTS_FILE), known)
    return Judge(uri, known)


def _digest(uri: str, folds: int) -> str:
    """A hash of the networks and of what is known of captions."""
    files = [*map(network_file, range(folds)), _CAPTIONS]
    hashes = [hashlib.sha256(storage.read_bytes(storage.join(uri, name))).hexdigest() for name in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
