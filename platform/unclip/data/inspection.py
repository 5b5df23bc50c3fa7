"""What a folder of records holds, looked at through a sample: what `jobs/inspect_data.py` puts on its page."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.data.decode import DecodeError, decode_image, open_image, upright_size
from unclip.data.manifest import Manifest, Slice, read_slices, scan
from unclip.utils import storage
from unclip.utils.html_page import Figure, HtmlPage

QUARANTINE_FOLDER = "quarantine"
_THUMBNAIL = 128
_ROW_GROUPS = 64
_QUARANTINE_FILES = 64
_DUPLICATES = ("duplicate", "near_duplicate")
_PROBLEMS = 20


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


_SHOWN: dict[str, Callable[[pa.DataType], bool]] = {
    "id": lambda _: True,
    "image": _is_bytes,
    "caption": _is_text,
    "image_embed": pa.types.is_fixed_size_list,
    "text_embed": pa.types.is_fixed_size_list,
}
"""What the page shows, where it has a type that it can be shown of."""

Problem = tuple[str, str, str]
"""(id, short reason, detail) of a record that cannot be trained on."""


class InspectConfig(Config):
    """Which records to look at, and how many."""

    data: str = ""
    """Folder of records, local or `s3://`; required."""
    out: str = "data_report.html"
    """The report: one HTML file, local or `s3://`."""
    rows: int = Field(default=2000, ge=1)
    """Records in the sample that the histograms show; they come from at most 64 row groups."""
    pictures: int = Field(default=48, ge=0)
    """Pictures of the sample on the contact sheet."""
    rejected: int = Field(default=12, ge=0)
    """Pictures shown for each reason in the quarantine."""
    seed: int = Field(default=0, ge=0)
    """Chooses the sample."""


@dataclass
class Quarantine:
    """What the quarantine tables say, as far as they were read.

    counts: rows of each reason in the files that were read.
    examples: some rows of each reason, (reason, source, key, detail, caption, thumbnail).
    files, files_read: how many tables there are, and how many of them were read.
    """

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    files: int = 0
    files_read: int = 0


def inspect(config: InspectConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Writes the report and returns what it is about: rows in all, rows in the sample, where it is.

    Raises `ConfigError` for a missing field, `DataError` for records that cannot be read, `OSError` for an output that
    cannot be written.
    """
    if not config.data:
        raise ConfigError("data: required, but not given")
    manifest = scan(config.data, ("id",), may_be_empty=True)
    rng = np.random.default_rng(config.seed)
    slices = sample_rows(manifest, config.rows, rng)
    facts: dict[str, Any] = {
        "rows": manifest.rows,
        "sample": sum(stop - start for _, start, stop in slices),
        "out": storage.absolute(config.out),
    }
    if dry_run:
        return facts
    sample = read_sample(manifest, slices)
    quarantine = read_quarantine(manifest.uri, config.rejected)
    page = _page(manifest, sample, quarantine, config, rng)
    storage.write_bytes(facts["out"], page.html().encode())
    return facts


def sample_rows(manifest: Manifest, rows: int, rng: np.random.Generator) -> list[Slice]:
    """Slices of `rows` records in all, spread evenly over at most 64 row groups chosen by their number of rows.

    Whole row groups have to be read, so a sample from few of them is what a huge set allows.
    """
    if not manifest.fragments:
        return []
    sizes = np.array([fragment.rows for fragment in manifest.fragments])
    count = min(_ROW_GROUPS, len(sizes), rows)
    chosen = np.sort(rng.choice(len(sizes), count, replace=False, p=sizes / sizes.sum()))
    wanted = _shares(rows, sizes[chosen])
    slices = []
    for fragment, take in zip(chosen, wanted, strict=True):
        start = int(rng.integers(sizes[fragment] - take + 1))
        slices.append((int(fragment), start, start + int(take)))
    return slices


def read_sample(manifest: Manifest, slices: Sequence[Slice]) -> pa.Table:
    """What the page shows of some slices; of each row group only these rows stay in memory."""
    columns = [name for name, fits in _SHOWN.items() if name in manifest.columns and fits(_type(manifest, name))]
    if not slices:
        return pa.schema([manifest.schema.field(name) for name in columns]).empty_table()
    parts = (read_slices(manifest, [part], columns) for part in slices)
    return pa.concat_tables([part.take(np.arange(part.num_rows)) for part in parts])


def read_quarantine(uri: str, examples: int) -> Quarantine:
    """The quarantine of a folder of records; of very many tables, 64 spread over all."""
    folder = storage.join(uri, QUARANTINE_FOLDER)
    names = [name for name in storage.names(folder) if name.endswith(".parquet")]
    result = Quarantine(files=len(names))
    for name in names[:: max(1, -(-len(names) // _QUARANTINE_FILES))]:
        with storage.local_file(storage.join(folder, name)) as path:
            table = pq.read_table(path)
        result.files_read += 1
        for row in _rows(table):
            result.counts[row["reason"]] += 1
            if len(result.examples[row["reason"]]) < examples:
                result.examples[row["reason"]].append(row)
    return result


def picture_sizes(table: pa.Table) -> tuple[npt.NDArray[np.float64], list[Problem]]:
    """(N, 2) width and height of each picture, upright, by its header; NaN where that is refused, and why it is."""
    sizes = np.full((table.num_rows, 2), np.nan)
    problems = []
    for row, content in enumerate(table.column("image")):
        try:
            sizes[row] = upright_size(open_image(content.as_py() or b""))
        except DecodeError as error:
            problems.append((str(table.column("id")[row]), error.reason, error.detail))
    return sizes, problems


def captions(table: pa.Table) -> tuple[list[str], list[Problem]]:
    """Each caption, "" for none, and which are not UTF-8; Arrow takes over such text unseen."""
    texts, problems = [], []
    for row, value in enumerate(table.column("caption")):
        content = value.as_buffer().to_pybytes() if value.is_valid else b""
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            texts.append(content.decode(errors="replace"))
            problems.append((str(table.column("id")[row]), "caption_not_utf8", str(error)))
    return texts, problems


def contact_sheet(table: pa.Table, texts: Sequence[str], rows: Iterable[int], most: int) -> list[Figure]:
    """Thumbnails, with their captions `texts`, of the first `most` of `rows` that can be decoded."""
    return list(islice((figure for row in rows if (figure := _figure(table, texts, row)) is not None), most))


def _figure(table: pa.Table, texts: Sequence[str], row: int) -> Figure | None:
    try:
        picture = decode_image(table.column("image")[row].as_py() or b"", target=_THUMBNAIL)
    except DecodeError:
        return None
    return _jpeg(picture, _THUMBNAIL), "image/jpeg", f"{texts[row] or 'no caption'} ({table.column('id')[row]})"


def clip_similarity(table: pa.Table) -> npt.NDArray[np.float64] | None:
    """Cosine of each record's image and text embedding; None where the records have none."""
    if not {"image_embed", "text_embed"} <= set(table.column_names):
        return None
    image, text = (_vectors(table.column(name)) for name in ("image_embed", "text_embed"))
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    similarity: npt.NDArray[np.float64] = (image * text).sum(axis=1) / np.where(norms > 0, norms, np.nan)
    return similarity


def _page(
    manifest: Manifest, sample: pa.Table, quarantine: Quarantine, config: InspectConfig, rng: np.random.Generator
) -> HtmlPage:
    page = HtmlPage(f"Records of {manifest.uri}")
    groups = len(manifest.fragments)
    page.note(
        f"{manifest.rows:,} records in {groups:,} row groups; histograms and pictures show {sample.num_rows:,} of them, "
        f"from at most {_ROW_GROUPS} row groups, chosen with seed {config.seed}."
    )
    _counts(page, manifest, quarantine)
    page.heading("Columns")
    page.table([(field.name, str(field.type)) for field in manifest.schema], ("column", "type"))
    strange = [name for name in _SHOWN if name in manifest.columns and name not in sample.column_names]
    if strange:
        page.note(f"Not shown, being of types that this page does not know: {', '.join(strange)}.")
    if sample.num_rows:
        _distributions(page, sample, config, rng)
    _rejected(page, quarantine)
    return page


def _counts(page: HtmlPage, manifest: Manifest, quarantine: Quarantine) -> None:
    page.heading("Counts")
    counts = manifest.facts.get("counts")
    if counts is None:
        page.note("The folder's manifest does not say what came in: it was not made by jobs/ingest.py.")
        page.table([("records", manifest.rows)])
        return
    reasons = [(f"quarantined: {reason}", int(rows)) for reason, rows in sorted(counts["quarantined"].items())]
    duplicates = [("duplicates", counts["duplicates"]), ("near duplicates", counts["near_duplicates"])]
    page.table([("rows in", counts["rows_in"]), ("kept", counts["kept"]), *reasons, *duplicates])
    accounted = counts["kept"] + sum(counts["quarantined"].values()) + counts["duplicates"] + counts["near_duplicates"]
    page.note("The counts add up." if accounted == counts["rows_in"] else f"The counts give {accounted:,} rows.")
    if quarantine.files_read < quarantine.files:
        page.note(f"{quarantine.files_read} of {quarantine.files} quarantine tables were read for the pictures below.")


def _distributions(page: HtmlPage, sample: pa.Table, config: InspectConfig, rng: np.random.Generator) -> None:
    page.heading("Distributions")
    plots: list[tuple[str, npt.NDArray[np.float64]]] = []
    figures: list[Figure] = []
    problems: list[Problem] = []
    texts = [""] * sample.num_rows
    if "caption" in sample.column_names:
        texts, problems = captions(sample)
    if "image" in sample.column_names:
        sizes, refused = picture_sizes(sample)
        problems += refused
        width, height = sizes[:, 0], sizes[:, 1]
        plots += [
            ("short side, pixels", sizes.min(axis=1)),
            ("megapixels", width * height / 1e6),
            ("aspect, width / height", width / height),
        ]
        lengths = sample.column("image").combine_chunks()
        plots.append(("bytes of a picture", np.array([len(value.as_py() or b"") for value in lengths], dtype=float)))
        figures = contact_sheet(sample, texts, rng.permutation(sample.num_rows).tolist(), config.pictures)
    if "caption" in sample.column_names:
        plots += [
            ("characters of a caption", np.array([len(text) for text in texts], dtype=float)),
            ("words of a caption", np.array([len(text.split()) for text in texts], dtype=float)),
        ]
    similarity = clip_similarity(sample)
    if similarity is not None:
        plots.append(("CLIP similarity of picture and caption", similarity))
    page.histograms(plots)
    if figures:
        page.heading("A random contact sheet")
        page.pictures(figures)
    if problems:
        page.heading("Not fit for training")
        counts = Counter(reason for _, reason, _ in problems)
        page.note(f"Of the sample: {', '.join(f'{rows:,} {reason}' for reason, rows in sorted(counts.items()))}.")
        page.table(problems[:_PROBLEMS], ("id", "reason", "detail"))


def _rejected(page: HtmlPage, quarantine: Quarantine) -> None:
    for is_duplicate, title in ((False, "Quarantine"), (True, "Duplicates found")):
        reasons = sorted(reason for reason in quarantine.counts if (reason in _DUPLICATES) == is_duplicate)
        if not reasons:
            continue
        page.heading(title)
        for reason in reasons:
            rows = quarantine.examples[reason]
            page.note(f"{reason}: {quarantine.counts[reason]:,} rows in the tables read; for example")
            page.pictures([(row["thumbnail"], "image/jpeg", _label(row)) for row in rows if row["thumbnail"]])
            blind = [(row["id"], row["source"], row["key"], row["detail"]) for row in rows if not row["thumbnail"]]
            if blind:
                page.table([tuple(str(value) for value in row) for row in blind], ("id", "source", "key", "detail"))


def _label(row: dict[str, Any]) -> str:
    return f"{row['detail']} ({row['id']})"


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _shares(total: int, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of each, `total` together: as evenly as the sizes allow."""
    total = min(total, int(sizes.sum()))
    level = bisect_left(range(int(sizes.max()) + 1), total, key=lambda most: int(np.minimum(sizes, most).sum()))
    shares = np.minimum(sizes, level)
    shares[np.flatnonzero(shares == level)[: shares.sum() - total]] -= 1
    return shares


def _type(manifest: Manifest, column: str) -> pa.DataType:
    return manifest.schema.field(column).type


def _vectors(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """(N, D), NaN where there is none."""
    array = column.combine_chunks()
    vectors = np.full((len(array), array.type.list_size), np.nan)
    values = array.flatten().to_numpy(zero_copy_only=False)  # of those that there are
    vectors[array.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, array.type.list_size)
    return vectors


def _jpeg(picture: npt.NDArray[np.uint8], side: int) -> bytes:
    image, sink = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(sink, "JPEG", quality=85)
    return sink.getvalue()
