"""Sources in an S3-compatible store: listings and rows are those of local disk, also where the store fails now and then."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.s3 import ObjectStore, object_store

from unclip.config.base import Config
from unclip.data.sources import SourceConfig
from unclip.utils import s3, storage


class Holder(Config):
    source: SourceConfig


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "FIRST_PAUSE_S", 0.02)
        patch.setattr(s3, "LONGEST_PAUSE_S", 0.05)
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, store: ObjectStore) -> Path:
    """One folder for each kind of source, which the bucket holds as well."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("parquet", "webdataset", "folder/inner", "urls"):
        (folder / name).mkdir(parents=True)
    for number in range(2):
        rows = {"image": [b"%d" % n * 5000 for n in range(30)], "caption": [f"caption {n}" for n in range(30)]}
        pq.write_table(pa.table(rows), folder / "parquet" / f"{number}.parquet", row_group_size=20)
        with tarfile.open(folder / "webdataset" / f"{number}.tar", "w") as archive:
            for n in range(20):
                member = tarfile.TarInfo(f"{n:05d}.jpg")
                member.size = 9000
                archive.addfile(member, io.BytesIO(bytes([n]) * 9000))
        (folder / "folder/inner" / f"{number}.jpg").write_bytes(b"x" * number)
        (folder / "folder" / f"top{number}.txt").write_text("a caption without a picture")
        records = [{"url": f"ftp://none/{n}", "caption": "c"} for n in range(5)]
        (folder / "urls" / f"{number}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "folder/captions.csv").write_text("file_name,caption\ninner/0.jpg,zero\ninner/1.jpg,one\n")
    for path in folder.rglob("*.*"):
        storage.write_bytes(f"{store.uri}/{path.relative_to(folder)}", path.read_bytes())
    return folder


def read(kind: str, uri: str) -> dict[str, list[dict[str, Any]]]:
    source = Holder.from_dict({"source": {"kind": kind, "uri": uri}}).source.build()
    return {part.name: [row for table in source.read(part) for row in table.to_pylist()] for part in source.parts()}


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("parquet", ""),
        ("parquet", "/*1.parquet"),
        ("webdataset", ""),
        ("webdataset", "/0.tar"),
        ("folder", ""),
        ("urls", ""),
    ],
)
def test_rows_are_those_of_local_disk(store: ObjectStore, local: Path, kind: str, pattern: str) -> None:
    expected = read(kind, f"{local}/{kind}{pattern}")
    assert sum(map(len, expected.values())) >= 4
    assert read(kind, f"{store.uri}/{kind}{pattern}") == expected
    with store.proxy.faults(seed=3, most=2) as plan:
        assert read(kind, f"{store.uri}/{kind}{pattern}") == expected
    assert plan.injected
