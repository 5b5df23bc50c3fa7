"""What a folder of records holds, looked at through a sample: what `jobs/inspect_data.py` puts on its page."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.data.decode import DecodeError, decode_image
from unclip.data.manifest import Manifest, Slice, read_slices, scan
from unclip.utils import storage
from unclip.utils.html_page import Figure, HtmlPage

QUARANTINE_FOLDER = "quarantine"
_THUMBNAIL = 128
_ROW_GROUPS = 64
_QUARANTINE_FILES = 64
_DUPLICATES = ("duplicate", "near_duplicate")


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
    manifest = scan(config.data, ("id",))
    facts: dict[str, Any] = {
        "rows": manifest.rows,
        "sample": min(config.rows, manifest.rows),
        "out": storage.absolute(config.out),
    }
    if dry_run:
        return facts
    rng = np.random.default_rng(config.seed)
    sample = read_sample(manifest, sample_rows(manifest, config.rows, rng))
    quarantine = read_quarantine(manifest.uri, config.rejected)
    page = _page(manifest, sample, quarantine, config, rng)
    storage.write_bytes(facts["out"], page.html().encode())
    return facts


def sample_rows(manifest: Manifest, rows: int, rng: np.random.Generator) -> list[Slice]:
    """Slices of `rows` records in all, spread evenly over at most 64 row groups chosen by their number of rows.

    Whole row groups have to be read, so a sample from few of them is what a huge set allows.
    """
    sizes = np.array([fragment.rows for fragment in manifest.fragments])
    count = min(_ROW_GROUPS, len(sizes), rows)
    chosen = np.sort(rng.choice(len(sizes), count, replace=False, p=sizes / sizes.sum()))
    wanted = np.minimum(_shares(min(rows, manifest.rows), count), sizes[chosen])
    slices = []
    for fragment, take in zip(chosen, wanted, strict=True):
        start = int(rng.integers(sizes[fragment] - take + 1))
        slices.append((int(fragment), start, start + int(take)))
    return slices


def read_sample(manifest: Manifest, slices: Sequence[Slice]) -> pa.Table:
    """All columns of some slices; of each row group only these rows stay in memory."""
    parts = (read_slices(manifest, [part], manifest.columns) for part in slices)
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


def picture_facts(table: pa.Table, max_side: int = _THUMBNAIL) -> tuple[npt.NDArray[np.float64], list[Figure | None]]:
    """(N, 2) width and height of each picture as stored, NaN where it is not readable, and its thumbnail."""
    sizes = np.full((table.num_rows, 2), np.nan)
    thumbnails: list[Figure | None] = []
    captions = table.column("caption").to_pylist() if "caption" in table.column_names else [""] * table.num_rows
    for row, (content, identifier) in enumerate(
        zip(table.column("image"), table.column("id").to_pylist(), strict=True)
    ):
        thumbnails.append(None)
        if not content.is_valid:
            continue
        try:
            with Image.open(io.BytesIO(content.as_py())) as header:
                sizes[row] = header.size
            picture = decode_image(content.as_py(), target=max_side)
        except (DecodeError, OSError, ValueError):
            continue
        thumbnails[row] = (_jpeg(picture, max_side), "image/jpeg", f"{captions[row] or 'no caption'} ({identifier})")
    return sizes, thumbnails


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
    page.table([(name, str(sample.schema.field(name).type)) for name in sample.column_names], ("column", "type"))
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
    if "image" in sample.column_names:
        sizes, thumbnails = picture_facts(sample)
        width, height = sizes[:, 0], sizes[:, 1]
        plots += [
            ("short side, pixels", sizes.min(axis=1)),
            ("megapixels", width * height / 1e6),
            ("aspect, width / height", width / height),
        ]
        lengths = sample.column("image").combine_chunks()
        plots.append(("bytes of a picture", np.array([len(value.as_py() or b"") for value in lengths], dtype=float)))
        shown = rng.permutation(sample.num_rows)
        figures = [figure for figure in (thumbnails[row] for row in shown) if figure is not None][: config.pictures]
    if "caption" in sample.column_names:
        texts = [text or "" for text in sample.column("caption").to_pylist()]
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


def _shares(total: int, count: int) -> npt.NDArray[np.int64]:
    """`total` in `count` whole parts that differ by one at most."""
    return total // count + (np.arange(count) < total % count).astype(np.int64)


def _vectors(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    vectors: npt.NDArray[np.float64] = values.reshape(len(array), -1)
    return vectors


def _jpeg(picture: npt.NDArray[np.uint8], side: int) -> bytes:
    image, sink = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(sink, "JPEG", quality=85)
    return sink.getvalue()
