"""The union of the sources: chosen by `kind`, and stored as it was written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import Config, ConfigError
from unclip.data.manifest import DataError
from unclip.data.sources import (
    FolderSourceConfig,
    ParquetSourceConfig,
    Source,
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
        path.write_text(f"ftp://nowhere/{caption}")


@pytest.mark.parametrize(
    ("kind", "name"), [("parquet", "a.parquet"), ("webdataset", "a.tar"), ("folder", "a.jpg"), ("urls", "a.txt")]
)
def test_a_file_changed_in_place_is_another_part_of_the_same_name(kind: str, name: str, tmp_path: Path) -> None:
    """What is made of a source is told by its parts."""
    source = source_of(kind, tmp_path)
    found = []
    for caption in ("one", "one", "a caption " * 2000):
        write(kind, tmp_path / name, caption)
        found.append(source.parts())
    assert found[0] == found[1] != found[2]
    assert [part.name for part in found[0]] == [part.name for part in found[2]]


@pytest.mark.parametrize(("kind", "name"), [("parquet", "a.parquet"), ("webdataset", "a.tar"), ("urls", "a.txt")])
def test_links_brackets_and_names_that_are_no_text(kind: str, name: str, tmp_path: Path) -> None:
    write(kind, tmp_path / name, "one")
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / name)
    for uri in (folder, folder / name, tmp_path / "set*" / name):
        source = source_of(kind, uri)
        assert sum(table.num_rows for part in source.parts() for table in source.read(part)) == 1
    (folder / f"b\udcff{name}").write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(DataError, match=r"the name 'b\\udcff.* is not UTF-8"):
        source_of(kind, folder).parts()


def source_of(kind: str, uri: Path) -> Source:
    job = Job.from_dict({"sources": [{"kind": kind, "uri": str(uri)} | NO_CAPTIONS.get(kind, {})]})
    return job.sources[0].build()


def test_unknown_kinds_and_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="laion"):
        Job.from_dict({"sources": [{"kind": "laion", "uri": "x"}]})
    with pytest.raises(ConfigError, match="caption_colum"):
        Job.from_dict({"sources": [{"kind": "parquet", "uri": "x", "caption_colum": "c"}]})
    with pytest.raises(ConfigError, match="uri"):
        Job.from_dict({"sources": [{"kind": "folder", "uri": ""}]})
