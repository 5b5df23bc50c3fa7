"""Shards, Parquet and tar, that are cut off, forged or not what they are called."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.corpus_pictures import drawing, encode

GOOD = 4
"""Rows of a good shard."""

Make = Callable[[Path], None]
Reasons = dict[str | None, int]


def pictures(seed: int = 0) -> list[bytes]:
    return [encode(drawing(seed + number), "JPEG") for number in range(GOOD)]


def good_parquet(path: Path, seed: int = 0) -> None:
    pq.write_table(_records(seed), path, compression="none")


def good_tar(path: Path, seed: int = 0) -> None:
    path.write_bytes(_tar(_members(seed)))


def parquet_shards() -> Iterator[tuple[str, Make, Reasons]]:
    """(name, what writes it, its rows' reasons)."""
    records = _records(100)
    captions = records["caption"]
    as_bytes = pa.array([b"ok", b"caf\xe9", b"ok", b"ok"], pa.binary()).view(pa.string())
    broken: Reasons = {"unreadable_shard": 1}
    for percent in (1, 30, 60, 99):
        yield f"cut_at_{percent}_percent", _written(lambda data, cut=percent: data[: len(data) * cut // 100]), broken
    yield "without_its_magic", _written(lambda data: data[:-4] + b"RAP1"), broken
    yield "of_zero_bytes", _written(lambda data: b""), broken
    yield "of_html", _written(lambda data: b"<html>403 Forbidden</html>"), broken
    yield "with_a_forged_footer_length", _written(lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"), broken
    yield "with_a_broken_page", _written(lambda data: data[:4] + bytes(200) + data[204:]), {"unreadable_shard": GOOD}
    yield "without_rows", _table(records.slice(0, 0)), {}
    yield "without_captions", _table(records.drop_columns(["caption"])), {"schema_drift": GOOD}
    yield (
        "with_numbers_for_captions",
        _table(records.set_column(1, "caption", pa.array(range(GOOD)))),
        {"schema_drift": GOOD},
    )
    yield "without_pictures", _table(records.drop_columns(["image"])), {"schema_drift": GOOD}
    yield "with_dictionaries", _table(records.set_column(1, "caption", captions.dictionary_encode())), {None: GOOD}
    yield "with_null_pictures", _table(records.set_column(0, "image", pa.nulls(GOOD, pa.binary()))), {"no_image": GOOD}
    yield (
        "with_null_captions",
        _table(records.set_column(1, "caption", pa.nulls(GOOD, pa.string()))),
        {"no_caption": GOOD},
    )
    yield (
        "with_a_caption_of_latin_1",
        _table(records.set_column(1, "caption", as_bytes)),
        {"invalid_utf8": 1, None: GOOD - 1},
    )
    yield "with_columns_in_another_order", _table(records.select(["score", "caption", "image"])), {None: GOOD}
    yield "with_a_further_column", _table(records.append_column("more", pa.array(range(GOOD)))), {None: GOOD}


def tar_shards() -> Iterator[tuple[str, str, Make, Reasons]]:
    """(name, suffix, what writes it, its rows' reasons)."""
    members = _members(200)
    whole = _tar(members)
    yield "cut_in_a_picture", ".tar", _bytes(whole[:3000]), {"truncated_shard": 1}
    yield (
        "cut_in_the_middle",
        ".tar",
        _bytes(_tar(members)[: _offset(members, 4) + 700]),
        {None: 2, "truncated_shard": 1},
    )
    yield "gzip_cut_off", ".tar.gz", _bytes(gzip.compress(whole)[:-300]), {None: GOOD - 1, "truncated_shard": 1}
    yield "gzipped", ".tar.gz", _bytes(gzip.compress(whole)), {None: GOOD}
    yield "gzip_of_garbage", ".tar.gz", _bytes(b"\x1f\x8b" + bytes(100)), {"unreadable_shard": 1}
    yield "of_zero_bytes", ".tar", _bytes(b""), {"truncated_shard": 1}
    yield "of_html", ".tar", _bytes(b"<html>403 Forbidden</html>" * 100), {"unreadable_shard": 1}
    yield "without_a_picture", ".tar", _bytes(_tar(members[1:])), {"no_image": 1, None: GOOD - 1}
    yield "without_a_caption", ".tar", _bytes(_tar([members[0], *members[2:]])), {"no_caption": 1, None: GOOD - 1}
    interleaved = [members[0], members[2], members[1], *members[3:]]
    yield (
        "interleaved",
        ".tar",
        _bytes(_tar(interleaved)),
        {"no_caption": 2, "repeated_key": 2, None: GOOD - 2},
    )
    for name, bad in (("traversal", "../../etc/cron"), ("absolute", "/etc/cron"), ("traversal_inside", "a/../../cron")):
        forged = [(f"{bad}.jpg", members[0][1]), (f"{bad}.txt", b"a caption"), *members]
        yield name, ".tar", _bytes(_tar(forged)), {"bad_member_name": 1, None: GOOD}
    yield "duplicate_key", ".tar", _bytes(_tar([*members, *members[:2]])), {None: GOOD, "repeated_key": 1}
    twice = [members[0], members[0], *members[1:]]
    yield "duplicate_member", ".tar", _bytes(_tar(twice)), {"duplicate_member": 1, None: GOOD - 1}
    for name, kind in (("symlink", tarfile.SYMTYPE), ("hard_link", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
        yield name, ".tar", _bytes(_tar([("link.jpg", kind), *members])), {"bad_member": 1, None: GOOD}
    yield "with_folders", ".tar", _bytes(_tar([("folder", tarfile.DIRTYPE), *members])), {None: GOOD}
    yield (
        "caption_of_latin_1",
        ".tar",
        _bytes(_tar([members[0], ("0.txt", b"caf\xe9"), *members[2:]])),
        {"invalid_utf8": 1, None: GOOD - 1},
    )
    yield (
        "sidecar_is_no_json",
        ".tar",
        _bytes(_tar([*members[:2], ("0.json", b"{ "), *members[2:]])),
        {"bad_sidecar": 1, None: GOOD - 1},
    )
    yield "broken_checksum", ".tar", _bytes(whole[:148] + b"777777\0 " + whole[156:]), {"unreadable_shard": 1}


def _records(seed: int) -> pa.Table:
    captions = [f"caption {seed + number}" for number in range(GOOD)]
    scores = [float(number) for number in range(GOOD)]
    return pa.table({"image": pa.array(pictures(seed), pa.binary()), "caption": captions, "score": scores})


def _table(table: pa.Table) -> Make:
    return lambda path: pq.write_table(table, path, compression="none")


def _written(change: Callable[[bytes], bytes]) -> Make:
    def make(path: Path) -> None:
        good_parquet(path, 100)
        path.write_bytes(change(path.read_bytes()))

    return make


def _bytes(data: bytes) -> Make:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def _members(seed: int) -> list[tuple[str, bytes]]:
    members = []
    for number, picture in enumerate(pictures(seed)):
        members += [(f"{number}.jpg", picture), (f"{number}.txt", f"caption {seed + number}".encode())]
    return members


def _tar(members: list[tuple[str, Any]]) -> bytes:
    """Content is a file's bytes, or the type of a member that is no file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 1:
                info.type, info.linkname = content, "0.jpg"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _offset(members: list[tuple[str, bytes]], count: int) -> int:
    """Where the member after `count` of them begins."""
    return sum(512 + -(-len(content) // 512) * 512 for _, content in members[:count])
