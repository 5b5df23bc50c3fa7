"""Tars: what good ones give, and that whatever is wrong with one, every row comes once and the good ones are whole."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from unclip.data.manifest import DataError
from unclip.data.sources import RAW_SCHEMA, WebDatasetSourceConfig

Entry = tuple[str, bytes]


def tar(entries: Sequence[Entry | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry, io.BytesIO(bytes(entry.size)))
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    return info


def sample(number: int, size: int = 700) -> list[Entry]:
    record = {"caption": "not this one", "url": f"http://host/{number}", "width": number}
    return [
        (f"{number:05d}.jpg", bytes([number % 251]) * size),
        (f"{number:05d}.txt", f"picture {number} é".encode()),
        (f"{number:05d}.json", json.dumps(record).encode()),
    ]


def samples(count: int) -> list[Entry]:
    return [entry for number in range(count) for entry in sample(number)]


def read(path: Path | str, content: bytes | None = None, **settings: Any) -> list[dict[str, Any]]:
    if content is not None:
        Path(path).write_bytes(content)
    source = WebDatasetSourceConfig(uri=str(path), **settings).build()
    tables = [table for part in source.parts() for table in source.read(part)]
    assert all(table.schema == source.schema() for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def good(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["reason"] is None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "00000.tar"


def test_rows_are_what_the_members_hold(path: Path) -> None:
    rows = read(path, tar(samples(3)), fields={"width": "int64", "url": "string", "missing": "bool"})
    assert [row["key"] for row in rows] == ["00000", "00001", "00002"]
    for number, row in enumerate(rows):
        picture, text, sidecar = sample(number)
        assert row["image"] == picture[1]
        assert row["caption"] == text[1].decode()
        assert row["metadata"] == sidecar[1].decode()
        assert (row["width"], row["url"], row["missing"]) == (number, f"http://host/{number}", None)
        assert row["reason"] is row["detail"] is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_in_every_form_of_tar(path: Path, form: int) -> None:
    names = [f"{'d' * 90}/{'é' if form != tarfile.USTAR_FORMAT else 'e'}{number}" for number in range(2)]
    if form != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "name")
    rows = read(path, tar([(f"{name}.png", name.encode()) for name in names], form))
    assert [(row["key"], row["image"].decode()) for row in rows] == [(name, name) for name in names]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "JPG"])
def test_picture_suffixes(path: Path, suffix: str) -> None:
    assert read(path, tar([(f"a.{suffix}", b"x")]))[0]["image"] == b"x"


def test_key_ends_at_the_first_dot_after_the_folder(path: Path) -> None:
    rows = read(path, tar([("./v1.0/a.jpg", b"1"), ("./v1.0/a.seg.png", b"2"), ("v2.0/a.jpg", b"3")]))
    assert [(row["key"], row["image"], row["reason"]) for row in rows] == [
        ("v1.0/a", b"1", None),
        ("v2.0/a", b"3", None),
    ]


def test_caption_of_the_sidecar_where_there_is_no_text(path: Path) -> None:
    rows = read(path, tar([("a.jpg", b"x"), ("a.json", b'{"caption": "hello"}'), ("b.jpg", b"y"), ("b.json", b"{}")]))
    assert [(row["caption"], row["reason"]) for row in rows] == [("hello", None), (None, None)]


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    plain = read(tmp_path / "a.tar", tar(samples(4)))
    assert read(tmp_path / "a.tar", gzip.compress(tar(samples(4)))) == plain
    (tmp_path / "a.tar").unlink()
    assert read(tmp_path / "b.tar.gz", gzip.compress(tar(samples(4)))) == plain


def test_parts_are_the_tars_of_a_folder_or_glob_by_name(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", "c.tgz", "_half.tar", ".x.tar", "list.parquet", "sub/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar(samples(1)))

    def names(uri: str) -> list[str]:
        return [part.name for part in WebDatasetSourceConfig(uri=uri).build().parts()]

    assert names(str(tmp_path)) == ["a.tar.gz", "b.tar", "c.tgz"]
    assert names(f"{tmp_path}/*.tar") == ["b.tar"]
    assert names(f"{tmp_path}/**/?.tar") == ["b.tar", "sub/d.tar"]
    assert names(f"{tmp_path}/b.tar") == ["b.tar"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        WebDatasetSourceConfig(uri=str(tmp_path / "nowhere")).build().parts()
    with pytest.raises(DataError, match=r"holds no file that ends in .tar"):
        WebDatasetSourceConfig(uri=str(tmp_path)).build().parts()


def test_tables_are_bounded_and_none_is_empty(path: Path) -> None:
    path.write_bytes(tar(samples(600)))
    source = WebDatasetSourceConfig(uri=str(path)).build()
    assert [table.num_rows for table in source.read(source.parts()[0])] == [256, 256, 88]
    path.write_bytes(tar([(f"{i}.jpg", bytes(30 << 20)) for i in range(4)]))
    assert [table.num_rows for table in source.read(source.parts()[0])] == [3, 1]


def test_empty_archive_has_no_rows(path: Path) -> None:
    assert read(path, tar([])) == []


BAD_MEMBERS: dict[str, tuple[list[Entry | tarfile.TarInfo], str]] = {
    "only a caption": ([("x.txt", b"c")], "no_image"),
    "only other members": ([("x.cls", b"1"), ("x.npy", b"2")], "no_image"),
    "no suffix": ([("README", b"r")], "bad_member_name"),
    "hidden": ([("__MACOSX/._x.jpg", b"r")], "bad_member_name"),
    "traversal": ([("../../x.jpg", b"r"), ("../../x.txt", b"t")], "bad_member_name"),
    "traversal inside": ([("a/../../x.jpg", b"r")], "bad_member_name"),
    "backslashes": ([("..\\x.jpg", b"r")], "bad_member_name"),
    "absolute": ([("/etc/x.jpg", b"r")], "bad_member_name"),
    "drive": ([("C:/x.jpg", b"r")], "bad_member_name"),
    "not UTF-8": ([("x\udcff.jpg", b"r")], "bad_member_name"),
    "symbolic link": ([special("x.jpg", tarfile.SYMTYPE), ("x.txt", b"t")], "bad_member"),
    "hard link": ([special("x.jpg", tarfile.LNKTYPE)], "bad_member"),
    "device": ([special("x.jpg", tarfile.CHRTYPE)], "bad_member"),
    "pipe": ([special("x.jpg", tarfile.FIFOTYPE)], "bad_member"),
    "unknown type": ([special("x.jpg", b"Z", 1000)], "bad_member"),
    "two pictures": ([("x.jpg", b"1"), ("x.png", b"2"), ("x.txt", b"t")], "duplicate_member"),
    "two texts": ([("x.jpg", b"1"), ("x.txt", b"2"), ("x.txt", b"3")], "duplicate_member"),
    "large picture": ([("x.jpg", bytes(5001)), ("x.txt", b"t")], "too_large"),
    "caption not UTF-8": ([("x.jpg", b"1"), ("x.txt", b"\xff\xfe")], "invalid_utf8"),
    "sidecar not UTF-8": ([("x.jpg", b"1"), ("x.json", b'{"caption": "\xff"}')], "invalid_utf8"),
    "lone surrogate": ([("x.jpg", b"1"), ("x.json", b'{"caption": "\\ud800"}')], "invalid_utf8"),
    "sidecar no JSON": ([("x.jpg", b"1"), ("x.json", b"{")], "bad_sidecar"),
    "sidecar too deep": ([("x.jpg", b"1"), ("x.json", b"[" * 5000)], "bad_sidecar"),
    "sidecar a list": ([("x.jpg", b"1"), ("x.json", b"[]")], "bad_sidecar"),
    "caption a number": ([("x.jpg", b"1"), ("x.json", b'{"caption": 1}')], "bad_sidecar"),
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_member_costs_its_own_row_alone(path: Path, case: str, form: int) -> None:
    entries, reason = BAD_MEMBERS[case]
    if case == "not UTF-8" and form == tarfile.PAX_FORMAT:
        entries = [("x.jpg", b"r"), ("x.txt", b"\xff")]  # pax itself is UTF-8: this is what such a name becomes
        reason = "invalid_utf8"
    before, after = sample(1), sample(2)
    rows = read(path, tar([*before, *entries, *after], form), max_member_bytes=5000)
    assert [row["reason"] for row in rows] == [None, reason, None]
    assert rows[1]["detail"]
    assert rows[0] == read(path, tar(before))[0]
    assert rows[2] == read(path, tar(after))[0]


def test_folders_are_no_rows(path: Path) -> None:
    rows = read(
        path,
        tar([special("d", tarfile.DIRTYPE), ("d/a.jpg", b"1"), special("d/e/", tarfile.DIRTYPE), ("d/a.txt", b"t")]),
    )
    assert [(row["key"], row["caption"]) for row in rows] == [("d/a", "t")]


def test_interleaved_members_are_rows_of_their_own(path: Path) -> None:
    entries = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"a"), ("b.txt", b"b"), ("c.jpg", b"3")]
    rows = read(path, tar(entries))
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("a", None), ("b", None), ("a", "repeated_key"), ("b", "repeated_key"), ("c", None),
    ]  # fmt: skip
    assert [row["caption"] for row in good(rows)] == [None, None, None]


def test_archives_joined_end_to_end_are_read_through(path: Path) -> None:
    rows = read(path, tar(samples(2)) + tar(sample(7)))
    assert [(row["key"], row["reason"]) for row in rows] == [("00000", None), ("00001", None), ("00007", None)]


def test_cut_at_any_byte_gives_the_rows_before_it_and_one_more(path: Path) -> None:
    whole = tar(samples(5))
    expected = read(path, whole)
    member_bytes = len(whole.rstrip(b"\0"))
    for cut in [*range(0, member_bytes, 97), *range(0, member_bytes, 512)]:
        rows = read(path, whole[:cut])
        assert [row["reason"] for row in rows[:-1]] == [None] * (len(rows) - 1), cut
        assert rows[-1]["reason"] == "truncated_shard"
        assert rows[-1]["key"] == "00000.tar"
        assert f"{len(rows) - 1} rows" in rows[-1]["detail"]
        assert rows[:-1] == expected[: len(rows) - 1]
        starts = [number * len(tar(sample(0)).rstrip(b"\0")) for number in range(5)]
        assert len(rows) - 1 >= sum(cut >= start + 512 * 9 for start in starts) - 1, starts


def test_cut_gzip_gives_the_rows_before_it_and_one_more(path: Path) -> None:
    entries = [(f"{number}.jpg", bytes(range(256)) * 64) for number in range(200)]
    expected = read(path, tar(entries))
    packed = gzip.compress(tar(entries))
    counts = []
    for cut in range(20, len(packed), len(packed) // 7):
        rows = read(path, packed[:cut])
        assert rows[-1]["reason"] == "truncated_shard"
        assert rows[:-1] == expected[: len(rows) - 1]
        counts.append(len(rows) - 1)
    assert counts == sorted(counts)
    assert counts[-1] > 100


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>" * 100, b"\x1f\x8b" + b"x" * 600, b"PK\x03\x04" + b"z" * 900]
)
def test_what_is_no_tar_is_one_row(path: Path, content: bytes) -> None:
    assert [row["reason"] for row in read(path, content)] == ["unreadable_shard"]


def test_empty_file_is_a_truncated_shard(path: Path) -> None:
    assert [row["reason"] for row in read(path, b"")] == ["truncated_shard"]


def test_damaged_header_in_the_middle_is_not_taken_for_the_end(path: Path) -> None:
    whole = bytearray(tar(samples(5)))
    position = whole.index(b"00003.jpg")
    whole[position + 130] ^= 0xFF
    rows = read(path, bytes(whole))
    assert [row["reason"] for row in rows] == [None, None, "unreadable_shard"]  # of the row before it, more may follow
    assert f"byte {position}" in rows[-1]["detail"]


def test_damaged_gzip_is_an_unreadable_shard(path: Path) -> None:
    packed = bytearray(gzip.compress(tar(samples(50))))
    packed[-6] ^= 1  # its checksum
    rows = read(path, bytes(packed))
    assert rows[-1]["reason"] == "unreadable_shard"
    assert all(row["reason"] is None for row in rows[:-1])


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def test_headers_made_here_are_what_tarfile_reads() -> None:
    info = tarfile.TarInfo.frombuf(header("x.jpg", b"%011o\0" % 77), "utf-8", "strict")
    assert (info.name, info.size) == ("x.jpg", 77)


def test_pax_header_bombs_are_not_read(path: Path) -> None:
    bomb = header("bomb", b"%011o\0" % (1 << 32), b"x")
    rows = read(path, tar(sample(0))[: 512 * 9] + bomb + bytes(4096))
    assert rows[-1]["reason"] == "truncated_shard"
    large = b"%d comment=" % (1 << 21) + b"x" * (1 << 21)
    content = header("pax", b"%011o\0" % len(large), b"x") + large + bytes(-len(large) % 512)
    rows = read(path, content + tar([("a.jpg", b"1"), ("b.jpg", b"2")]))
    assert [(row["key"], row["reason"]) for row in rows] == [("a", "bad_member"), ("b", None)]


@pytest.mark.parametrize("record", [b"0 path=x\n", b"9999999 path=x\n", b"path=x\n", b"12 path=x\n"])
def test_malformed_pax_records(path: Path, record: bytes) -> None:
    content = header("pax", b"%011o\0" % len(record), b"x") + record + bytes(-len(record) % 512)
    rows = read(path, content + tar([("a.jpg", b"1"), ("b.jpg", b"2")]))
    assert [(row["key"], row["reason"]) for row in rows] == [("a", "bad_member"), ("b", None)]


@pytest.mark.parametrize(
    ("size", "before", "reason"),
    [(b"\xff" * 12, ["a"], "unreadable_shard"), (b"\x80" + b"\xff" * 11, ["a", "b"], "truncated_shard")],
    ids=["negative", "astronomic"],
)
def test_absurd_sizes_end_the_shard(path: Path, size: bytes, before: list[str], reason: str) -> None:
    rows = read(path, tar([("a.jpg", b"1"), ("b.jpg", b"2")])[:2048] + header("x.jpg", size) + bytes(2048))
    assert [row["key"] for row in rows[:-1]] == before
    assert rows[-1]["reason"] == reason


def test_sparse_members_are_stepped_over(path: Path) -> None:
    sparse = bytearray(header("s.jpg", b"%011o\0" % 700, b"S"))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:155] = b"%06o\0" % sum(sparse)
    more = bytearray(512)
    more[504] = 1
    content = bytes(sparse) + bytes(more) + bytes(512) + b"x" * 1024
    rows = read(path, content + tar(sample(1)))
    assert [(row["key"], row["reason"]) for row in rows] == [("s", "bad_member"), ("00001", None)]
    pax = tarfile.TarInfo("p.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1"}
    assert [row["reason"] for row in read(path, tar([pax, *sample(1)]))] == ["bad_member", None]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20000), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_gives_rows_and_no_error(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    content = bytearray(tar(samples(4)))
    for position, value in damage:
        content[position % len(content)] = value
    rows = read(tmp_path_factory.getbasetemp() / "damaged.tar", bytes(content))
    assert len(rows) >= 1
    assert all((row["reason"] is None) == (row["detail"] is None) for row in rows)


class Broken(io.BytesIO):
    """A connection that fails once, in the middle."""

    left = 1

    def read(self, size: int | None = -1) -> bytes:
        if Broken.left and self.tell() > 3000:
            Broken.left -= 1
            raise ConnectionResetError("reset by peer")
        return super().read(size)


class BrokenStorage(MemoryFileSystem):
    """The files in memory, over connections that break."""

    protocol = "broken"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("broken://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Broken(super()._open(path, "rb").getvalue())


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_broken_connection_is_an_error_and_not_a_truncated_shard(memory: MemoryFileSystem, pack: Any) -> None:
    noise = random.Random(0)
    memory.pipe_file("/bucket/a.tar", pack(tar([(f"{i}.jpg", noise.randbytes(900)) for i in range(8)])))
    expected = read("memory://bucket/a.tar")
    fsspec.register_implementation("broken", BrokenStorage, clobber=True)
    source = WebDatasetSourceConfig(uri="broken://bucket/a.tar").build()
    part = source.parts()[0]
    Broken.left = 1
    with pytest.raises(OSError, match=r"a\.tar' cannot be read: reset by peer"):
        list(source.read(part))
    again = pa.concat_tables(source.read(part)).to_pylist()
    assert again == expected
    assert len(good(again)) == 8


def test_fields_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="caption: a column of that name is there already"):
        WebDatasetSourceConfig(uri="x", fields={"caption": "string"})
    with pytest.raises(ValidationError, match="id_column 'id' is not a field with type int64"):
        WebDatasetSourceConfig(uri="x", id_column="id", fields={"id": "string"})
    assert WebDatasetSourceConfig(uri="x", id_column="id", fields={"id": "int64"}).build().schema().names == [
        *RAW_SCHEMA.names, "metadata", "id",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("12", "int64", 12), (12.0, "int64", 12), (12.5, "int64", None), (1 << 63, "int64", None), (True, "int64", None),
        ("x", "int64", None), (3, "float64", 3.0), ("0.5", "float64", 0.5), (10**400, "float64", None), ([1], "float64", None),
        (True, "bool", True), ("False", "bool", False), (1, "bool", None), ("a", "string", "a"), (1, "string", "1"),
        ({"a": [1]}, "string", '{"a":[1]}'), (None, "string", None), ("\ud800", "string", "\\ud800"),
    ],
)  # fmt: skip
def test_fields_keep_their_type(path: Path, value: Any, kind: str, expected: Any) -> None:
    entries = [("a.jpg", b"x"), ("a.json", json.dumps({"f": value}).encode())]
    assert read(path, tar(entries), fields={"f": kind})[0]["f"] == expected
