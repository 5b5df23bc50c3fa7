"""Splits on the whole table; rendering, layout and reuse on a small real sample."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.labels import distinct_labels
from unclip.data.manifest import read_slices, scan
from unclip.data.openmoji import ATTRIBUTES, OpenMoji, PrepareConfig, load_drawings, prepare
from unclip.data.openmoji_captions import COLOURS
from unclip.data.openmoji_splits import SPLITS, assign_splits, combination

PARTS = ("role", "skin_tone", "hair", "colour", "shape")


@pytest.fixture(scope="module")
def drawings() -> list[OpenMoji]:
    return load_drawings()[0]


@pytest.fixture(scope="module", params=[0, 1, 2])
def by_split(request: pytest.FixtureRequest, drawings: list[OpenMoji]) -> dict[str, list[OpenMoji]]:
    members: dict[str, list[OpenMoji]] = {split: [] for split in SPLITS}
    splits = assign_splits(drawings, seed=request.param, heldout_fraction=0.03)
    for drawing, split in zip(drawings, splits, strict=True):
        members[split].append(drawing)
    return members


def test_compositional_split_holds_new_combinations_of_known_parts(by_split: dict[str, list[OpenMoji]]) -> None:
    held_out = {combination(drawing) for drawing in by_split["compositional"]}
    elsewhere = {combination(drawing) for split in ("train", "heldout") for drawing in by_split[split]}
    assert not held_out & (elsewhere - {None})
    assert sum(c is not None and c[0] == "colour" for c in held_out) == 6
    assert sum(c is not None and c[:2] == ("role", "person") for c in held_out) == 6  # one for each hair
    trained = {(part, getattr(drawing, part)) for drawing in by_split["train"] for part in PARTS}
    for drawing in by_split["compositional"]:
        assert {(part, getattr(drawing, part)) for part in PARTS} <= trained


def test_what_looks_or_reads_alike_is_in_one_split(by_split: dict[str, list[OpenMoji]]) -> None:
    homes = defaultdict(set)
    for split, members in by_split.items():
        for drawing in members:
            homes[drawing.svg_sha256].add(split)
            homes[drawing.caption].add(split)
            if drawing.role:  # a man walking and a person walking are drawn alike
                homes[drawing.role, drawing.skin_tone, drawing.hair].add(split)
    assert all(len(splits) == 1 for splits in homes.values())


def test_split_sizes(by_split: dict[str, list[OpenMoji]], drawings: list[OpenMoji]) -> None:
    assert sum(map(len, by_split.values())) == len(drawings) == 3913
    assert 0.02 < len(by_split["heldout"]) / len(drawings) < 0.04
    assert 40 <= len(by_split["compositional"]) <= 120


def test_splits_depend_on_the_seed_and_not_on_the_order(drawings: list[OpenMoji]) -> None:
    splits = assign_splits(drawings, seed=0, heldout_fraction=0.03)
    backwards = assign_splits(drawings[::-1], seed=0, heldout_fraction=0.03)
    assert splits == backwards[::-1]
    assert splits != assign_splits(drawings, seed=1, heldout_fraction=0.03)


def test_missing_part_is_refused(drawings: list[OpenMoji]) -> None:
    hearts_only = [drawing for drawing in drawings if drawing.shape == "heart" or drawing.colour == "grey"]
    assert set(assign_splits(hearts_only, seed=0, heldout_fraction=0.03)) == {
        "train"
    }  # no other shape: nothing held out


def test_ids_are_unique_and_stable(drawings: list[OpenMoji]) -> None:
    ids = [drawing.id for drawing in drawings]
    assert len(set(ids)) == len(ids)
    assert all(0 <= number < 2**63 for number in ids)
    expected = int.from_bytes(hashlib.blake2b(b"1F600", digest_size=8).digest(), "little") // 2
    assert next(drawing.id for drawing in drawings if drawing.emoji == "😀") == expected


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareConfig, dict]:
    out = tmp_path_factory.mktemp("openmoji")
    config = PrepareConfig(out=str(out), sizes=(32, 48), limit=70, heldout_fraction=0.01, workers=1)
    return config, prepare(config)


def test_report_adds_up(prepared: tuple[PrepareConfig, dict]) -> None:
    _, report = prepared
    assert report["drawings"] == 4495 == sum(report["left_out"].values()) + sum(report["splits"].values())
    assert report["rows"]["32/train"] == 70
    assert report["rows"]["32/compositional"] == report["splits"]["compositional"]
    assert report["kept"] == []


def test_records_are_as_documented(prepared: tuple[PrepareConfig, dict]) -> None:
    config, report = prepared
    drawings = {drawing.hexcode: drawing for drawing in load_drawings()[0]}
    for split in SPLITS:
        folder = f"{config.out}/48/{split}"
        manifest = scan(folder, columns=("id", "image", "caption", "width", "height", "emoji", "hexcode", "split"))
        assert manifest.rows == manifest.facts["rows"] == report["rows"][f"48/{split}"]
        assert manifest.facts["attribution"].startswith("All emojis designed by OpenMoji")
        assert max(fragment.rows for fragment in manifest.fragments) <= 64
        for file in manifest.facts["files"]:
            content = Path(folder, file["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        for row in pq.read_table(f"{folder}/part-00000.parquet").to_pylist():
            drawing = drawings[row["hexcode"]]
            assert (row["id"], row["caption"], row["split"]) == (drawing.id, drawing.caption, split)
            for name in ATTRIBUTES[:-1]:
                assert row[name] == (getattr(drawing, name) or "none")
            picture = Image.open(io.BytesIO(row["image"]))
            assert (picture.mode, picture.size) == ("RGB", (48, 48))
            assert (row["width"], row["height"]) == (48, 48)


def test_every_attribute_is_a_column_of_classes(prepared: tuple[PrepareConfig, dict]) -> None:
    config, _ = prepared
    manifest = scan(f"{config.out}/48/train")
    labels = {name: distinct_labels(manifest, name, at_most=100) for name in ATTRIBUTES}
    assert set(labels["colour"]) <= {*COLOURS, "none"}
    assert all("none" in labels[name] for name in ("role", "gender", "skin_tone", "hair", "count", "colour", "shape"))
    assert labels["split"] == ("train",)


def test_sizes_hold_the_same_records_and_the_same_drawings(prepared: tuple[PrepareConfig, dict]) -> None:
    config, _ = prepared
    batches = {}
    for size in config.sizes:
        manifest = scan(f"{config.out}/{size}/train")
        spec = BatchSpec(image_size=32)
        table = read_slices(manifest, [(0, 0, 64)], spec.columns())
        batches[size] = make_batch(table, np.arange(64), spec, seed=0)
    np.testing.assert_array_equal(batches[32]["id"], batches[48]["id"])
    difference = np.abs(batches[32]["image"].astype(int) - batches[48]["image"]).mean(axis=(1, 2, 3))
    assert difference.max() < 12
    assert batches[32]["image"][:, 0, 0].min() == 255  # white, opaque background


def test_drawings_have_their_colours(prepared: tuple[PrepareConfig, dict]) -> None:
    config, _ = prepared
    table = pq.read_table(f"{config.out}/48/compositional/part-00000.parquet")
    for row in table.to_pylist():
        if row["colour"] in ("red", "blue", "green") and row["shape"] in ("heart", "circle", "square"):
            centre = np.asarray(Image.open(io.BytesIO(row["image"])))[24, 24].astype(int)
            if "hollow" not in row["caption"]:
                assert centre.argmax() == ("red", "green", "blue").index(row["colour"])


def test_the_same_command_again_keeps_everything(prepared: tuple[PrepareConfig, dict]) -> None:
    config, report = prepared
    times = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*.parquet")}
    again = prepare(config)
    assert again["kept"] == list(report["rows"])
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*.parquet")} == times


def test_unfinished_and_differently_made_folders_are_made_anew(tmp_path: Path) -> None:
    config = PrepareConfig(out=str(tmp_path), sizes=(16,), limit=5, heldout_fraction=0.01, workers=1)
    prepare(config)
    shard = tmp_path / "16/heldout/part-00000.parquet"
    content = shard.read_bytes()
    (tmp_path / "16/heldout/manifest.json").unlink()  # as after a kill
    shard.write_bytes(content[:100])
    smaller = config.merged({"limit": 3})
    report = prepare(smaller)
    assert report["kept"] == ["16/compositional"]
    assert scan(f"{tmp_path}/16/train").rows == 3
    assert shard.read_bytes() == content  # the same bytes as without the interruption
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.md").read_text()
    assert json.loads((tmp_path / "16/train/manifest.json").read_text())["limit"] == 3


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = prepare(PrepareConfig(out=str(tmp_path / "out"), sizes=(16,)), dry_run=True)
    assert sum(report["splits"].values()) == 3913
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("*.json"))


def test_job_prints_counts_that_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = runpy.run_path(str(Path(__file__).parents[3] / "jobs/prepare_openmoji.py"))
    assert job["main"](["--dry-run", "--set", f"out={tmp_path}", "--set", "sizes=[16]", "--set", "limit=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = int(lines[0].split()[0])
    assert total == sum(int(line.split()[0]) for line in lines if line.startswith("  "))
    assert f"{tmp_path}/16/train: 5 records, would be made" in lines


def test_job_refuses_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = runpy.run_path(str(Path(__file__).parents[3] / "jobs/prepare_openmoji.py"))
    (tmp_path / "file").write_text("in the way")
    assert job["main"](["--set", f"out={tmp_path}/file/out", "--set", "sizes=[16]"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_worker_processes_give_the_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2):
        config = PrepareConfig(out=str(tmp_path / str(workers)), sizes=(16,), limit=4, heldout_fraction=0.001)
        prepare(config.merged({"workers": workers}))
    assert (tmp_path / "1/16/train/part-00000.parquet").read_bytes() == (
        tmp_path / "2/16/train/part-00000.parquet"
    ).read_bytes()
