"""A folder of pictures, with captions in text files beside them or in a list."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
from pydantic import Field

from unclip.data.sources.base import (
    PICTURE_SUFFIXES,
    FieldSettings,
    Part,
    Row,
    is_utf8,
    printable,
    read_text,
    to_json,
    to_tables,
    unsafe_name,
)
from unclip.data.sources.listing import SourceFile, find_tree
from unclip.data.sources.lists import Record, read_records
from unclip.utils import storage

LIST_NAMES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
_READ_THREADS = 16
_READ_AHEAD = 32


class FolderSourceConfig(FieldSettings):
    """Pictures in a folder and those below it. Every file but hidden ones is a picture, a caption, a list or a row with
    its reason.

    The caption of `NAME.jpg` is in `NAME.txt`, or in a list in its folder or one above: `captions.jsonl`,
    `captions.csv`, `metadata.jsonl` or `metadata.csv` with the fields `file_name` (a path from the list's folder) and
    `caption` or `text`. The lists are read at the start, so for more than some million pictures use tars or Parquet.
    """

    kind: Literal["folder"] = "folder"
    files_per_part: int = Field(1024, gt=0, le=1 << 20)
    """Rows that are read, and read again after an interruption, at once."""
    max_file_bytes: int = Field(1 << 26, gt=0)
    """Larger files are not read; their rows have the reason `too_large`."""

    def build(self) -> FolderSource:
        return FolderSource(self)


@dataclass(frozen=True)
class Entry:
    """A row that still lacks its bytes.

    Args:
        picture: None where the row has none.
        text: the file with its caption; None where the row has the caption already, or none.
    """

    row: Row
    picture: SourceFile | None = None
    text: SourceFile | None = None


@dataclass(frozen=True)
class Entries(Part):
    """Some rows of the folder."""

    entries: tuple[Entry, ...]


class FolderSource:
    """A part is a fixed number of rows, sorted by key: the path under the folder, or LIST:NUMBER for a bad record."""

    def __init__(self, config: FolderSourceConfig) -> None:
        self._config = config

    def schema(self) -> pa.Schema:
        return self._config.table_schema()

    def parts(self) -> tuple[Entries, ...]:
        entries = sorted(self._entries(find_tree(self._config.uri)), key=lambda entry: entry.row.key)
        step = self._config.files_per_part
        return tuple(
            Entries(f"{start:09d}", tuple(entries[start : start + step])) for start in range(0, len(entries), step)
        )

    def read(self, part: Entries) -> Iterator[pa.Table]:
        yield from to_tables(self._rows(part.entries), self.schema())

    def _rows(self, entries: tuple[Entry, ...]) -> Iterator[Row]:
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            for start in range(0, len(entries), _READ_AHEAD):
                yield from threads.map(_read, entries[start : start + _READ_AHEAD])

    def _entries(self, files: Iterable[SourceFile]) -> Iterator[Entry]:
        pictures: dict[str, Entry] = {}
        texts: dict[str, SourceFile] = {}
        lists = []
        for file in files:
            suffix = posixpath.splitext(file.name)[1][1:].lower()
            if posixpath.basename(file.name) in LIST_NAMES:
                lists.append(file)
            elif suffix not in PICTURE_SUFFIXES and suffix != "txt":
                yield _refused(file.name, "unknown_file", "is neither a picture nor a caption by its suffix")
            elif file.size > self._config.max_file_bytes:
                yield _refused(
                    file.name, "too_large", f"has {file.size} bytes, more than {self._config.max_file_bytes}"
                )
            elif suffix == "txt":
                texts[posixpath.splitext(file.name)[0]] = file
            else:
                pictures[file.name] = Entry(Row(printable(file.name)), picture=file)
        yield from _add_texts(pictures, texts)
        listed: set[str] = set()
        for file in lists:
            for record in read_records(file.uri):
                yield from self._add_record(pictures, listed, file.name, record)
        yield from pictures.values()

    def _add_record(
        self, pictures: dict[str, Entry], listed: set[str], list_name: str, record: Record
    ) -> Iterator[Entry]:
        """Gives a picture what a list says of it; yields a row of its own where the record has no picture."""
        key = f"{list_name}:{record.number}"
        values = dict(record.values)
        file_name = values.pop("file_name", None)
        if record.problem is not None or not isinstance(file_name, str):
            yield _refused(key, "bad_row", record.problem or "has no file_name")
            return
        if unsafe := unsafe_name(file_name):
            yield _refused(key, "bad_file_name", f"file_name {file_name!r} {unsafe}")
            return
        name = posixpath.normpath(posixpath.join(posixpath.dirname(list_name), file_name))
        if name not in pictures:
            yield _refused(key, "no_image", f"names {file_name!r}, which is no picture that can be read")
        elif name in listed:
            yield _refused(key, "repeated_key", f"names {file_name!r}, as another record does")
        else:
            listed.add(name)
            caption = values.pop("caption", values.pop("text", None))
            entry = pictures[name]
            row = replace(entry.row, carried=self._config.carried(values, to_json(values)))
            pictures[name] = replace(entry, row=row if entry.text else _with_caption(row, caption, key))


def _add_texts(pictures: dict[str, Entry], texts: dict[str, SourceFile]) -> Iterator[Entry]:
    by_stem = defaultdict(list)
    for name in pictures:
        by_stem[posixpath.splitext(name)[0]].append(name)
    for stem, file in texts.items():
        for name in by_stem[stem]:
            pictures[name] = replace(pictures[name], text=file)
        if not by_stem[stem]:
            yield _refused(file.name, "no_image", "has no picture of its name beside it")


def _with_caption(row: Row, caption: object, key: str) -> Row:
    if caption is not None and not isinstance(caption, str):
        return replace(row, reason="bad_row", detail=printable(f"{key}: the caption is no text"))
    if caption is not None and not is_utf8(caption):
        detail = printable(f"{key}: the caption is not UTF-8")
        return replace(row, caption=printable(caption), reason="invalid_utf8", detail=detail)
    return replace(row, caption=caption)


def _refused(key: str, reason: str, detail: str) -> Entry:
    return Entry(Row(printable(key), reason=reason, detail=printable(f"{key!r} {detail}")))


def _read(entry: Entry) -> Row:
    row = entry.row
    if entry.picture is not None:
        row = replace(row, image=storage.read_bytes(entry.picture.uri))
    if entry.text is None:
        return row
    caption, valid = read_text(storage.read_bytes(entry.text.uri))
    if not valid:
        return replace(row, caption=caption, reason="invalid_utf8", detail=f"the caption of {row.key!r} is not UTF-8")
    return replace(row, caption=caption)
