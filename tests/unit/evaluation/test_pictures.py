"""Which pictures are judged: what jobs write is read in full, with its own captions; samples are fair and stay the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.evaluation import pictures as rooms
from unclip.evaluation.pictures import PictureSet, choose, open_pictures
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.maker import PictureMaker
from unclip.pipelines.bundle import Bundle

PROMPTS = [f"drawing number {number}" for number in range(6)]


def generate(bundle: str, out: Path, **fields: object) -> str:
    """12 pictures of six prompts in three shards, by the generation job itself."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    one_step = {"up_to": 16, "decoder": {"num_inference_steps": 1}, "prior": {"num_inference_steps": 1}}
    given = {"bundle": bundle, "prompts": str(prompts), "out": str(out), "n": 2, "prompts_per_shard": 2}
    config = GenerateConfig.from_dict(given | {"device": "cpu", "options": one_step} | fields)
    job = BulkJob.prepare(config)
    units, maker = job.begin(), PictureMaker(job.config)
    maker.setup()
    for unit in units:
        maker.process(unit)
    maker.close()
    job.finish()
    return str(out)


def rows(pictures: PictureSet) -> list[tuple[int, bytes, str]]:
    tables = [table for _, table in pictures.read(pictures.units)]
    return [(row["id"], row["image"], row["caption"]) for table in tables for row in table.to_pylist()]


@pytest.fixture(scope="module")
def generated(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("generated")
    return {form: generate(tiny_bundle, root / form, format=form) for form in ("parquet", "webdataset")}


def test_both_forms_of_shards_are_the_same_pictures_with_their_prompts(
    generated: dict[str, str], tiny_bundle: str
) -> None:
    stages = Bundle.load(tiny_bundle).configs
    sets = {
        form: choose("pictures", open_pictures("pictures", uri), limit=None, seed=0) for form, uri in generated.items()
    }
    assert rows(sets["parquet"]) == rows(sets["webdataset"])
    found = {(record // 10_000, record % 10_000): caption for record, _, caption in rows(sets["webdataset"])}
    assert found == {(row, number): PROMPTS[row] for row in range(6) for number in range(2)}
    for pictures in sets.values():
        told = pictures.protocol()
        assert told["made_by"]["counts"]["pictures"] == told["rows"] == told["available"] == 12
        sampling = told["made_by"]["settings"]["sampling"]
        assert sampling["decoder"] == stages["decoder"].sampling.merged({"num_inference_steps": 1}).to_dict()
        assert (
            sampling["prior"]["guidance_scale"] == stages["prior"].sampling.guidance_scale
        )  # nobody asked for another


def test_a_tar_that_is_not_what_the_manifest_says_is_refused(generated: dict[str, str], tmp_path: Path) -> None:
    source, copy = Path(generated["webdataset"]), tmp_path / "copy"
    copy.mkdir()
    for name in ("manifest.json", "data-00000.tar", "data-00001.tar", "data-00002.tar"):
        (copy / name).write_bytes((source / name).read_bytes())
    whole = (copy / "data-00001.tar").read_bytes()
    (copy / "data-00001.tar").write_bytes(whole[: len(whole) // 2])
    pictures = choose("pictures", open_pictures("pictures", str(copy)), limit=None, seed=0)
    with pytest.raises(DataError, match=r"data-00001\.tar'"):
        rows(pictures)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][1]["rows"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "data-00001.tar").write_bytes(whole)
    with pytest.raises(DataError, match=r"has 4 pictures, manifest\.json says 5"):
        rows(choose("pictures", open_pictures("pictures", str(copy)), limit=None, seed=0))


def test_single_files_unfinished_folders_and_nothing_are_refused(tiny_bundle: str, tmp_path: Path) -> None:
    folder = generate(tiny_bundle, tmp_path / "files", format="folder", prompts_per_shard=6)
    with pytest.raises(ConfigError, match=r"pictures = .*: holds single files; generate with format=parquet"):
        open_pictures("pictures", folder)
    unfinished = tmp_path / "unfinished"
    (unfinished / "_units").mkdir(parents=True)
    (unfinished / "data-00000.tar").touch()
    with pytest.raises(DataError, match="unfinished"):
        open_pictures("pictures", str(unfinished))
    with pytest.raises(DataError, match=r"^reference: data folder .* does not exist"):
        open_pictures("reference", str(tmp_path / "nowhere"))


def test_a_sample_has_the_asked_size_is_fair_and_depends_on_the_seed_alone(
    pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_pictures("pictures", pictures)
    whole = {record: (image, caption) for record, image, caption in rows(choose("a", folder, limit=None, seed=0))}
    assert sorted(whole) == list(range(60))
    counts: Counter[int] = Counter()
    for seed in range(200):
        sample = choose("a", folder, limit=15, seed=seed)
        counts.update(int(unit.fragment) for unit in sample.units for _ in unit.rows)
        assert sample.rows == 15
    # Row groups of 16, 14, 16 and 14 records get their share of 3000; six standard deviations are 150.
    assert all(abs(counts[fragment] - 3000 * size / 60) < 150 for fragment, size in enumerate((16, 14, 16, 14)))
    sample = rows(choose("a", folder, limit=15, seed=3))
    assert all(whole[record] == (image, caption) for record, image, caption in sample)
    monkeypatch.setattr(rooms, "UNIT_ROWS", 3)
    smaller = choose("a", folder, limit=15, seed=3)
    assert rows(smaller) == sample
    assert max(len(unit.rows) for unit in smaller.units) == 3
    assert [unit.number for unit in smaller.units] == list(range(len(smaller.units)))
    wanted = [14, 0, 7]
    assert smaller.images(wanted) == {row: sample[row][1] for row in wanted}


def test_pictures_without_captions_can_be_a_reference(pictures: str, tmp_path: Path) -> None:
    table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(pictures).glob("*.parquet")))
    pq.write_table(table.drop_columns(["caption"]), tmp_path / "a.parquet")
    found = choose("reference", open_pictures("reference", str(tmp_path)), limit=4, seed=0)
    ((_, records),) = found.read(found.units)
    assert records.column("caption").null_count == 4
    assert np.isin(records.column("id").to_numpy(), table.column("id").to_numpy()).all()
