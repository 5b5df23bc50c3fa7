"""Lists of records: what they hold, and that their parts together hold the same and are read alone."""

from __future__ import annotations

import csv
import io
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data.sources import UrlSourceConfig
from unclip.data.sources.base import StorageFile
from unclip.data.sources.lists import divide, read_records

AWKWARD = {
    "jsonl": (b'\xef\xbb\xbf{"n": 0}\n\n  \n{"n": "\xe9"}\r\n{"n": "%s"}\r{"n":\n[1]\n', b'{"n": 1}\n'),
    "txt": (b"\n\xef\xbb\xbfone\r\n \r\rtwo \xff\n%s\n", b"three\n"),
    "csv": (b'\r\n\xef\xbb\xbfa,"b\nc"\n1,"two\r\nlines, ""q"" %s"\r\n\n1,2,3\r4,\xe9\n', b'5,"\n\n"\n'),
    "tsv": (b'a\tb\n1\t"x\ny"\n"%s\n', b"2\t3\n"),
    "no header.csv": (b'"%s"\n1,2\n' % (b"x" * 140_000) + b"%s", b"3,4\n"),
}


@pytest.mark.parametrize("form", AWKWARD)
@pytest.mark.parametrize("most", [1, 2, 3, 7, 1000])
def test_parts_of_text_lists_hold_the_records_of_the_whole(tmp_path: Path, form: str, most: int) -> None:
    """Whatever the ends of lines, quotes, and blocks that are read; `%s` is longer than a block."""
    head, line = AWKWARD[form]
    path = tmp_path / f"list.{form}"
    path.write_bytes(head.replace(b"%s", b"y" * 300_000) + line * 30)
    whole = list(read_records(str(path)))
    assert len(whole) >= 31
    stretches = divide(str(path), most)
    assert [(start, stop) for start, stop, _ in stretches] == [
        (start, min(start + most, len(whole))) for start in range(0, len(whole), most)
    ]
    assert [record for stretch in stretches for record in read_records(str(path), *stretch)] == whole


def test_what_text_lists_hold(tmp_path: Path) -> None:
    """Their records, by what Python's readers make of the decoded text."""
    text = '\ufeffa,"b\nc"\r\n1,"two\nlines, ""q"""\r\n\r\n3,é\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    expected = list(csv.DictReader(io.StringIO(text[1:], newline="")))
    assert [record.values for record in read_records(str(tmp_path / "a.csv"))] == expected
    lines = ["one", "two \u2028 parts", "three é"]
    (tmp_path / "a.txt").write_bytes("\r\n\n".join(lines).encode())
    assert [record.values for record in read_records(str(tmp_path / "a.txt"))] == [{"url": line} for line in lines]


def test_a_part_of_a_text_list_reads_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("url,caption\n" + "".join(f"ftp://none/{n},{'c' * 1000}\n" for n in range(2000)))
    source = UrlSourceConfig(uri=str(path), rows_per_part=20).build()
    parts = source.parts()
    counted: list[int] = []
    plain = StorageFile.read

    def counting(file: StorageFile, size: int = -1) -> bytes:
        content = plain(file, size)
        counted.append(len(content))
        return content

    monkeypatch.setattr(StorageFile, "read", counting)
    (table,) = source.read(parts[-1])
    assert table["key"].to_pylist() == [f"a.csv:{n}" for n in range(1980, 2000)]
    assert sum(counted) < path.stat().st_size / 4


@pytest.mark.parametrize(
    ("groups", "cuts"),
    [
        ([2, 2, 1], [0, 4, 5]),
        ([3, 3], [0, 3, 6]),
        ([10, 1], [0, 4, 8, 11]),
        ([1, 10], [0, 1, 5, 9, 11]),
        ([0, 4, 0, 4], [0, 4, 8]),
    ],
)
def test_parts_of_parquet_lists_are_cut_at_row_groups(tmp_path: Path, groups: list[int], cuts: list[int]) -> None:
    schema = pa.schema([("url", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for rows in groups:
            writer.write_table(pa.table({"url": ["x"] * rows}, schema=schema))
    stretches = divide(str(tmp_path / "a.parquet"), 4)
    assert stretches == [(start, stop, 0) for start, stop in pairwise(cuts)]
