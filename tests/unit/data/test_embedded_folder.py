"""Records and their embeddings put together from parts: in any order, after any interruption, the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data import embedded_folder
from unclip.data.embedded_folder import EmbeddedFolder, part_name
from unclip.data.manifest import DataError, Slice, records_identity, scan

D = 8
ROWS = 700
"""Of each of two files, in row groups of 400 and 300: units of 256, 144, 256 and 44."""
CLIP = {"source": "somewhere", "fingerprint": "a CLIP", "embed_dim": D}


def embeddings(ids: np.ndarray, width: int) -> np.ndarray:
    """(B, width) float16 that tell their records."""
    return np.stack([np.random.default_rng(int(number)).standard_normal(width) for number in ids]).astype(np.float16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(2):
        ids = np.arange(ROWS) + ROWS * number
        table = pa.table(
            {
                "id": ids,
                "image": pa.array([b"%d" % i for i in ids], pa.large_binary()),
                "image_embed": pa.array([0.5] * ROWS),
            }
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=400)
    return folder


def open_folder(source: Path, out: Path) -> EmbeddedFolder:
    manifest = scan(str(source))
    return EmbeddedFolder(manifest, str(out), {"records": records_identity(manifest), "clip": "a CLIP"})


def write_part(folder: EmbeddedFolder, unit: Slice, *, width: int = 4) -> None:
    fragment, start, stop = unit
    ids = np.arange(start, stop) + (fragment // 2) * ROWS + (fragment % 2) * 400
    vectors = embeddings(ids, 2 * D + width)
    parts = np.split(vectors, [D, 2 * D], axis=1)
    named = dict(zip(("image_embed", "text_embed", "text_states"), map(np.ascontiguousarray, parts), strict=True))
    embedded_folder.write_part(folder.uri, unit, {"id": ids, **named})


def complete(folder: EmbeddedFolder, *, backwards: bool = False) -> dict[str, bytes]:
    """Does whatever is not there yet; the folder's content."""
    found = folder.begin()
    order = -1 if backwards else 1
    for file in list(folder.shards)[::order]:
        if folder.receipt_name(file) in found:
            continue
        units = [unit for fragment in folder.shards[file] for unit in folder.units(fragment)]
        for unit in units[::order]:
            if part_name(unit) not in found:
                write_part(folder, unit)
        folder.write_shard(file)
    folder.finish(CLIP, folder.statistics(list(folder.shards)))
    folder.clean()
    return contents(folder)


def contents(folder: EmbeddedFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder.uri).rglob("*") if path.is_file()}


def test_every_record_keeps_its_place_and_gets_its_own(source: Path, tmp_path: Path) -> None:
    folder = open_folder(source, tmp_path / "out")
    assert [unit[2] - unit[1] for fragment in range(2) for unit in folder.units(fragment)] == [256, 144, 256, 44]
    assert set(complete(folder)) == {"0.parquet", "1.parquet", "manifest.json", "pca.safetensors"}
    assert folder.is_complete()
    made = scan(folder.uri, ("id", "image", "image_embed"))
    assert [fragment.rows for fragment in made.fragments] == [400, 300, 400, 300]
    for number in range(2):
        before, after = (pq.read_table(place / f"{number}.parquet") for place in (source, tmp_path / "out"))
        assert after.column_names == ["id", "image", "image_embed", "text_embed", "text_states"]
        assert after.select(["id", "image"]).equals(before.select(["id", "image"]))
        expected = embeddings(after.column("id").to_numpy(), 2 * D + 4)
        for name, columns in {"image_embed": slice(0, D), "text_states": slice(2 * D, None)}.items():
            found = after.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            np.testing.assert_array_equal(found.reshape(ROWS, -1), expected[:, columns])


def test_neither_order_nor_interruptions_are_seen(source: Path, tmp_path: Path) -> None:
    expected = complete(open_folder(source, tmp_path / "straight"))
    assert complete(open_folder(source, tmp_path / "backwards"), backwards=True) == expected
    for stop in range(9):  # after so many steps of the first shard; then the process was gone
        folder = open_folder(source, tmp_path / f"stopped-{stop}")
        folder.begin()
        units = [unit for fragment in folder.shards["0.parquet"] for unit in folder.units(fragment)]
        for unit in units[: min(stop, 4)]:
            write_part(folder, unit)
        if stop >= 5:
            folder.write_shard("0.parquet")
            Path(folder.uri, "1.parquet.1234.tmp").write_bytes(b"half a shard")
        if stop == 6:  # the shard is there, what comes after it is not
            shutil.rmtree(Path(folder.uri, "_parts"))
            folder.begin()
        if stop == 7:
            for unit in units:
                write_part(folder, unit)  # as if it had gone before they were removed
        if stop == 8:
            for unit in (u for fragment in folder.shards["1.parquet"] for u in folder.units(fragment)):
                write_part(folder, unit)
            folder.write_shard("1.parquet")
            folder.finish(CLIP, folder.statistics(list(folder.shards)))
            assert folder.is_complete()
            folder.clean()
            assert contents(folder) == expected
            continue
        assert not folder.is_complete()
        assert complete(folder) == expected, stop


def test_row_groups_that_become_too_large_are_divided(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_folder(source, tmp_path / "whole")
    complete(whole)
    monkeypatch.setattr(embedded_folder, "ROW_GROUP_BYTES", 6000)
    folder = open_folder(source, tmp_path / "out")
    complete(folder)
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["row_groups"] for shard in facts["shards"]] == [[256, 144, 256, 44]] * 2
    assert pq.read_table(tmp_path / "out" / "0.parquet").equals(pq.read_table(tmp_path / "whole" / "0.parquet"))


def test_records_that_changed_meanwhile_are_refused(source: Path, tmp_path: Path) -> None:
    folder = open_folder(source, tmp_path / "out")
    folder.begin()
    for fragment in folder.shards["0.parquet"]:
        for unit in folder.units(fragment):
            write_part(folder, unit)
    table = pq.read_table(source / "0.parquet")
    changed = table.set_column(0, "id", pa.array(np.arange(ROWS)[::-1].copy()))
    pq.write_table(changed, source / "0.parquet", row_group_size=400)
    with pytest.raises(DataError, match=r"0\.parquet' changed while it was embedded"):
        folder.write_shard("0.parquet")
    assert not (tmp_path / "out" / "0.parquet").exists()


def test_a_folder_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    folder = open_folder(source, tmp_path / "out")
    assert not folder.is_complete()
    folder.begin()
    assert not folder.is_complete()
    other = EmbeddedFolder(folder.source, folder.uri, folder.identity | {"clip": "another"})
    with pytest.raises(DataError, match="was begun with clip = 'a CLIP', now it is 'another'; choose another folder"):
        other.is_complete()
    complete(folder)
    with pytest.raises(DataError, match="was begun with clip = 'a CLIP'"):
        other.is_complete()
    with pytest.raises(DataError, match="holds files that this job did not make"):
        EmbeddedFolder(folder.source, str(source), folder.identity).is_complete()


def test_a_job_killed_at_its_very_first_write_goes_on(source: Path, tmp_path: Path) -> None:
    expected = complete(open_folder(source, tmp_path / "straight"))
    folder = open_folder(source, tmp_path / "out")
    (tmp_path / "out" / "_parts").mkdir(parents=True)
    (tmp_path / "out" / "_parts" / "identity.json.1234.tmp").write_bytes(b"{")
    assert not folder.is_complete()
    assert complete(folder) == expected


def test_parts_are_named_by_row_group_and_row(source: Path, tmp_path: Path) -> None:
    """Not by the names of files, which every task would need the whole manifest for, and which may be long."""
    folder = open_folder(source, tmp_path / "out")
    found = folder.begin()
    for unit in folder.units(2):
        write_part(folder, unit)
    assert folder.begin() - found - {"identity.json"} == {"000000002.000000000.parquet", "000000002.000000256.parquet"}
    assert folder.parts(2) <= folder.begin()
