"""What comes out of a job: the pictures of the Python call, the best of several, in files that our readers take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.support.engines import assert_same_pictures, randomized

from unclip.data.decode import decode_image
from unclip.data.ingest.records import RecordPolicy, judge
from unclip.data.manifest import scan
from unclip.data.sources import ParquetSourceConfig, WebDatasetSourceConfig
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.making import encode
from unclip.generation.bulk.shards import SHARD_SCHEMA
from unclip.generation.outputs import read_png, read_png_metadata
from unclip.pipelines.bundle import Bundle, save_stage
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import StageConfig

Run = Callable[[GenerateConfig], dict[str, Any]]
MakeConfig = Callable[..., GenerateConfig]

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red heart", "id": "first", "size": 32, "note": "é"},
    {"prompt": "", "id": "none"},
    {"prompt": "a blue circle", "n": 3, "seed": 5, "guidance_scale": 1.0},
    {"prompt": "a green star", "num_inference_steps": 5},
    {"prompt": "a dog", "size": 100},
]
WANTED = [(0, 0), (2, 5), (2, 6), (2, 7), (3, 0)]
"""(row, seed) of the pictures, in the order of their ids."""


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: str) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


def by_call(pipeline: Pipeline, config: GenerateConfig, row: Mapping[str, Any], seed: int) -> dict[int, np.ndarray]:
    """The pictures of the Python call, by their size."""
    decoder = {name: row[name] for name in ("guidance_scale", "num_inference_steps") if name in row}
    options = config.options.merged({"decoder": decoder, **({"up_to": row["size"]} if "size" in row else {})})
    output = pipeline([row["prompt"]], [seed], options=options)
    return {size: pictures[0] for size, pictures in output.images.items()}


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_shards_hold_the_pictures_of_the_python_call(
    config: MakeConfig, run: Run, prompts: str, pipeline: Pipeline, form: str
) -> None:
    settings = config(prompts=prompts, format=form, prompts_per_shard=2, options=SMALL_OF_TWO)
    manifest = run(settings)
    assert manifest["counts"] == {
        "prompts": 5, "done": 3, "quarantined": 2, "pictures": 5, "candidates": 5,
        "reasons": {"bad_parameters": 1, "empty": 1},
    }  # fmt: skip
    records = read_shards(settings)
    assert [(record["id"], record["seed"]) for record in records] == [
        (row * 10_000 + seed - ROWS[row].get("seed", 0), seed) for row, seed in WANTED
    ]
    for record, (number, seed) in zip(records, WANTED, strict=True):
        row = ROWS[number]
        expected = by_call(pipeline, settings, row, seed)
        picture = decode_image(record["image"])
        assert_same_pictures({max(expected): picture}, {max(expected): expected[max(expected)]})
        score = cosine(pipeline, row["prompt"], picture)
        assert record["clip_score"] == pytest.approx(score, abs=1e-3)  # one of 256 values may be the next one
        assert (record["prompt"], record["prompt_id"]) == (row["prompt"], row.get("id"))
        assert (record["width"], record["height"], record["format"]) == (max(expected), max(expected), "png")
        assert record["bundle"] == Bundle.load(settings.bundle).digest
        assert record["fields"] == ({"note": "é"} if "note" in row else {})
        decoder = record["parameters"]["sampling"]["decoder"]
        assert decoder["guidance_scale"] == row.get("guidance_scale", 2.0)
        assert decoder["num_inference_steps"] == row.get("num_inference_steps", 2)
    quarantine = [pq.read_table(Path(settings.out, "quarantine", entry["file"])) for entry in manifest["quarantine"]]
    refused = [row for table in quarantine for row in table.to_pylist()]
    assert [(row["row"], row["prompt_id"], row["reason"]) for row in refused] == [
        (1, "none", "empty"),
        (4, None, "bad_parameters"),
    ]
    assert Path(settings.out, "grid.png").exists()


SMALL_OF_TWO = {"up_to": 32, "decoder": {"num_inference_steps": 2}, "prior": {"num_inference_steps": 2}}


def read_shards(config: GenerateConfig) -> list[dict[str, Any]]:
    """The rows of all shards by our own readers, with JSON texts read."""
    if config.format == "parquet":
        manifest = scan(config.out, SHARD_SCHEMA.names)
        files = dict.fromkeys(fragment.file for fragment in manifest.fragments)
        rows = [row for file in files for row in pq.read_table(Path(config.out, file)).to_pylist()]
        assert len(rows) == manifest.rows == manifest.facts["rows"]
        return [row | {name: json.loads(row[name]) for name in ("parameters", "fields")} for row in rows]
    source = WebDatasetSourceConfig(uri=config.out).build()
    rows = [row for part in source.parts() for table in source.read(part) for row in table.to_pylist()]
    assert all(row["reason"] is None for row in rows)
    records = [json.loads(row["metadata"]) for row in rows]
    assert [row["key"] for row in rows] == [f"{record['id']:012d}" for record in records]
    assert [row["caption"] for row in rows] == [record["prompt"] for record in records]
    return [record | {"image": row["image"]} for record, row in zip(records, rows, strict=True)]


def cosine(pipeline: Pipeline, prompt: str, picture: np.ndarray) -> float:
    clip = pipeline.clip
    assert clip is not None
    image, text = clip.encode_image(picture[None]).numpy()[0], clip.encode_text(clip.tokenize([prompt])).numpy()[0]
    return float(image @ text / np.linalg.norm(image) / np.linalg.norm(text))


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_the_best_of_several_are_kept(config: MakeConfig, run: Run, pipeline: Pipeline, form: str) -> None:
    """By making and scoring all of them with the Python call."""
    settings = config(prompt="a red heart", n=2, best_of=7, seed=3, format=form)
    assert run(settings)["counts"]["candidates"] == 7
    images = [by_call(pipeline, settings, {"prompt": "a red heart"}, seed)[16] for seed in range(3, 10)]
    scores = [cosine(pipeline, "a red heart", image) for image in images]
    best = sorted(np.argsort(scores)[-2:].tolist())
    assert np.diff(np.sort(scores))[-2] > 1e-4  # else another one might be the best by a rounding
    if form == "folder":
        assert sorted(path.name for path in Path(settings.out, "16").iterdir()) == [f"00000-{3 + i}.png" for i in best]
    else:
        assert [(row["id"], row["seed"]) for row in read_shards(settings)] == [(i, 3 + i) for i in best]


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_other_encodings(config: MakeConfig, run: Run, pipeline: Pipeline, encoding: str) -> None:
    settings = config(prompt="a red heart", format="webdataset", encoding=encoding, quality=80)
    run(settings)
    (record,) = read_shards(settings)
    assert record["format"] == encoding
    assert record["image"][:4] in (b"\xff\xd8\xff\xe0", b"RIFF")
    expected = by_call(pipeline, settings, {"prompt": "a red heart"}, 0)[16]
    difference = decode_image(record["image"]).astype(int) - decode_image(encode(expected, encoding, 80))
    assert np.abs(difference).mean() < 2  # where one of 256 values is the next one


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_better_quality_is_nearer_to_the_picture_and_larger(encoding: str) -> None:
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    contents = [encode(picture, encoding, quality) for quality in (10, 50, 95)]
    errors = [np.abs(decode_image(content).astype(int) - picture).mean() for content in contents]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2
    assert len(contents[0]) < len(contents[1]) < len(contents[2])


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_shards_can_be_ingested(config: MakeConfig, run: Run, prompts: str, form: str) -> None:
    settings = config(prompts=prompts, format=form, options=SMALL_OF_TWO)
    run(settings)
    source = (
        ParquetSourceConfig(uri=settings.out, caption_column="prompt", id_column="id").build()
        if form == "parquet"
        else WebDatasetSourceConfig(uri=settings.out, fields={"id": "int64"}, id_column="id").build()
    )
    policy = RecordPolicy.from_dict({"pictures": {"min_side": 1}})
    for part in source.parts():
        for table in source.read(part):
            policy.check(table.schema)
            kept, rejected = judge(table, np.asarray(table["id"]), "made", part.name, policy)
            assert rejected.num_rows == 0
            assert kept["id"].to_pylist() == [0, 20_000, 20_001, 20_002, 30_000]
            assert kept["width"].to_pylist() == [32, 32, 32, 32, 32]


@pytest.fixture(scope="module", params=["classes", "captions"])
def forerunner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_configs: Any) -> str:
    """A decoder of classes or of captions alone: no prior, no CLIP."""
    classes = {"embed_dim": None, "text": None, "num_classes": 2}, {"label_column": "kind", "classes": ["cat", "dog"]}
    model, further = classes if request.param == "classes" else ({"embed_dim": None}, {})
    decoder: StageConfig = tiny_configs["decoder"].merged({"model": model, **further})
    uri = str(tmp_path_factory.mktemp(request.param) / "bundle")
    save_stage(uri, decoder, tensors=randomized(decoder).state_dict(), clip=None, provenance={})
    return uri


def test_decoders_without_a_prior(config: MakeConfig, run: Run, forerunner: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,guidance_scale\ncat,\ndog,1\nan owl, \n")
    settings = config(bundle=forerunner, prompts=str(tmp_path / "p.csv"), format="parquet")
    counts = run(settings)["counts"]
    has_classes = bool(Bundle.load(forerunner).configs["decoder"].classes)  # type: ignore[union-attr]
    assert counts["reasons"] == ({"bad_prompt": 1} if has_classes else {})
    pipeline = Pipeline.from_bundle(forerunner)
    for record, row in zip(read_shards(settings), [{}, {"guidance_scale": 1.0}, {}], strict=False):
        expected = by_call(pipeline, settings, {"prompt": record["prompt"], **row}, 0)
        assert_same_pictures({16: decode_image(record["image"])}, expected)
        assert record["clip_score"] is None


def test_a_folder_has_every_size_of_every_picture(
    config: MakeConfig, run: Run, prompts: str, pipeline: Pipeline
) -> None:
    settings = config(prompts=prompts, options=SMALL_OF_TWO)
    run(settings)
    names = [f"{row:05d}-{seed}.png" for row, seed in WANTED]
    for size in (16, 32):
        assert sorted(path.name for path in Path(settings.out, str(size)).iterdir()) == names
    for name, (row, seed) in zip(names, WANTED, strict=True):
        files = {size: str(Path(settings.out, str(size), name)) for size in (16, 32)}
        expected = by_call(pipeline, settings, ROWS[row], seed)
        assert_same_pictures({size: read_png(uri) for size, uri in files.items()}, expected)
        metadata = read_png_metadata(files[32])
        assert (metadata["prompt"], metadata["seed"]) == (ROWS[row]["prompt"], str(seed))
        assert metadata["bundle"] == Bundle.load(settings.bundle).digest
        assert json.loads(metadata["settings"])["precision"] == "fp32"
