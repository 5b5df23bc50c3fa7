"""The union of the sources: chosen by `kind`, and stored as it was written."""

from __future__ import annotations

import pytest

from unclip.config.base import Config, ConfigError
from unclip.data.sources import (
    FolderSourceConfig,
    ParquetSourceConfig,
    SourceConfig,
    UrlSourceConfig,
    WebDatasetSourceConfig,
)


class Job(Config):
    sources: tuple[SourceConfig, ...]


def test_kind_chooses_the_source() -> None:
    kinds = {
        "parquet": ParquetSourceConfig,
        "webdataset": WebDatasetSourceConfig,
        "folder": FolderSourceConfig,
        "urls": UrlSourceConfig,
    }
    job = Job.from_dict({"sources": [{"kind": kind, "uri": "s3://bucket/data"} for kind in kinds]})
    assert [type(source) for source in job.sources] == list(kinds.values())
    assert Job.from_dict(job.to_dict()) == job


def test_unknown_kinds_and_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="laion"):
        Job.from_dict({"sources": [{"kind": "laion", "uri": "x"}]})
    with pytest.raises(ConfigError, match="caption_colum"):
        Job.from_dict({"sources": [{"kind": "parquet", "uri": "x", "caption_colum": "c"}]})
    with pytest.raises(ConfigError, match="uri"):
        Job.from_dict({"sources": [{"kind": "folder", "uri": ""}]})
