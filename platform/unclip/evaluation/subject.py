"""What is judged: pictures, a prior, or an upsampler. Each knows its records, its networks and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from unclip.config.base import ConfigError
from unclip.data.batches import Batch
from unclip.evaluation.config import EvaluateConfig
from unclip.evaluation.extractors import Network
from unclip.evaluation.feature_folder import FeatureFolder, Features
from unclip.evaluation.pictures import PictureSet, Unit
from unclip.utils.html_page import HtmlPage

Metrics = dict[str, Any]
"""By their names, as JSON values."""


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Args:
        metrics: by the name of what they are of.
        page: all but the protocol.
        tables: what was found of each record, by the name of the file.
    """

    metrics: Mapping[str, Metrics | None]
    page: HtmlPage
    tables: Mapping[str, pa.Table]


class Subject(Protocol):
    """What is judged. Picklable."""

    roles: tuple[str, ...]
    """Names of the sets whose numbers of records belong to the result."""

    @property
    def sets(self) -> Mapping[str, PictureSet]:
        """The records that networks see in this job, by name."""
        ...

    @property
    def folders(self) -> Mapping[str, FeatureFolder]:
        """Where what networks make of each set is; those of an earlier evaluation among them."""
        ...

    @property
    def protocol(self) -> Mapping[str, Any]:
        """All that decides the numbers, as JSON values; that of each set under its name, None where there is none."""
        ...

    def networks(self, name: str) -> Sequence[Network]:
        """Those that see the records of a set."""
        ...

    def inputs(self, name: str, unit: Unit, table: pa.Table) -> Batch:
        """What the networks see of a unit's records: arrays with a row for each. `DataError` names a record of no use."""
        ...

    def folder_protocol(self, name: str) -> dict[str, Any]:
        """All that decides what is in a folder."""
        ...

    def judge(self, gathered: Mapping[str, Features]) -> Judgement:
        """From all that the folders hold."""
        ...


def check_given(config: EvaluateConfig, fields: Sequence[str]) -> None:
    """Raises `ConfigError` for the first of the required `fields` that is empty."""
    for field in fields:
        if not getattr(config, field):
            raise ConfigError(f"{field}: required, but not given")


def settings_of(config: EvaluateConfig, fields: Sequence[str]) -> dict[str, Any]:
    """The values of fields that change numbers."""
    return {name: value for name, value in config.to_dict().items() if name in fields}
