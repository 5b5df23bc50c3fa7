"""The union of the sources: chosen by `kind`, and stored as it was written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import Config, ConfigError
from unclip.data.sources import (
    FolderSourceConfig,
    ParquetSourceConfig,
    SourceConfig,
    UrlSourceConfig,
    WebDatasetSourceConfig,
)

NO_CAPTIONS = {"urls": {"caption_column": None}}


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


def write(kind: str, path: Path, caption: str) -> None:
    """One picture with its caption, as the source has it."""
    if kind == "parquet":
        pq.write_table(pa.table({"image": [b"picture"], "caption": [caption]}), path)
    elif kind == "webdataset":
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("0.txt")
            member.size = len(caption)
            archive.addfile(member, io.BytesIO(caption.encode()))
    else:
        path.write_text(f"http://nowhere/{caption}")


@pytest.mark.parametrize(
    ("kind", "name"), [("parquet", "a.parquet"), ("webdataset", "a.tar"), ("folder", "a.jpg"), ("urls", "a.txt")]
)
def test_a_file_changed_in_place_is_another_part_of_the_same_name(kind: str, name: str, tmp_path: Path) -> None:
    """What is made of a source is told by its parts."""
    job = Job.from_dict({"sources": [{"kind": kind, "uri": str(tmp_path)} | NO_CAPTIONS.get(kind, {})]})
    source = job.sources[0].build()
    found = []
    for caption in ("one", "one", "a caption " * 2000):
        write(kind, tmp_path / name, caption)
        found.append(source.parts())
    assert found[0] == found[1] != found[2]
    assert [part.name for part in found[0]] == [part.name for part in found[2]]


def test_unknown_kinds_and_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="laion"):
        Job.from_dict({"sources": [{"kind": "laion", "uri": "x"}]})
    with pytest.raises(ConfigError, match="caption_colum"):
        Job.from_dict({"sources": [{"kind": "parquet", "uri": "x", "caption_colum": "c"}]})
    with pytest.raises(ConfigError, match="uri"):
        Job.from_dict({"sources": [{"kind": "folder", "uri": ""}]})
