"""A whole evaluation without a cluster: its numbers, what is made once, what a folder is begun with, and its page."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import ConfigError
from unclip.data.decode import decode_image
from unclip.data.manifest import DataError
from unclip.evaluation import pictures as rooms
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.discrepancy import cmmd
from unclip.evaluation.extractors import central_square
from unclip.evaluation.feature_folder import Features, features_table
from unclip.evaluation.frechet import frechet_distance, statistics_of
from unclip.evaluation.inception_score import inception_score
from unclip.evaluation.job import EvaluationJob
from unclip.evaluation.metrics import compare
from unclip.models.clip import ClipModel

Build = Callable[..., EvaluatePicturesConfig]
Run = Callable[[EvaluatePicturesConfig], dict[str, Any]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truth(clip: ClipModel, folder: str) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Embeddings of each picture and of its own caption, one at a time."""
    records = [row for path in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    squares = [central_square(decode_image(record["image"]), clip.image_size) for record in records]
    images = [clip.encode_image(square[np.newaxis]).numpy()[0] for square in squares]
    texts = [clip.encode_text(clip.tokenize([record["caption"]])).numpy()[0] for record in records]
    return np.array(images), np.array(texts), records


def test_every_number_is_of_every_picture_with_its_own_caption(
    config: Build, evaluate: Run, clip: ClipModel, pictures: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "UNIT_ROWS", 5)
    settings = config(microbatch=3)
    result = evaluate(settings)
    images, texts, records = truth(clip, pictures)
    real, real_texts, _ = truth(clip, reference)
    scores = (images.astype(np.float64) * texts).sum(axis=1)
    written = pq.read_table(Path(settings.out) / "scores.parquet").to_pylist()
    assert [(row["id"], row["caption"]) for row in written] == [(row["id"], row["caption"]) for row in records]
    np.testing.assert_allclose([row["clip_score"] for row in written], scores, atol=1e-6)
    found = result["metrics"]
    assert found["clip_score"]["mean"] == pytest.approx(scores.mean(), abs=1e-6)
    assert found["clip_score"]["low"] < scores.mean() < found["clip_score"]["high"]
    others = [images[i] @ texts[j] for i in range(60) for j in range(60) if (i - j) % 20]
    assert found["clip_score"]["other_captions"] == pytest.approx(np.mean(others), abs=1e-6)
    assert found["reference_clip_score"]["mean"] == pytest.approx((real * real_texts).sum(axis=1).mean(), abs=1e-6)
    assert found["clip"]["cmmd"] == pytest.approx(cmmd(images, real), rel=1e-3)
    assert found["clip"]["frechet_distance"] == pytest.approx(
        frechet_distance(statistics_of(images), statistics_of(real)), rel=1e-3
    )
    assert (result["pictures"], result["reference"]) == (60, 50)
    assert json.loads((Path(settings.out) / "result.json").read_text()) == result


def test_pictures_against_themselves_are_the_best_there_is(config: Build, evaluate: Run, pictures: str) -> None:
    found = evaluate(config(reference=pictures))["metrics"]["clip"]
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert found["cmmd"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["diversity"] == found["reference_diversity"]


def test_the_inception_score_is_of_the_networks_classes(config: Build, evaluate: Run, inception_weights: str) -> None:
    settings = config(inception=inception_weights, reference=None, limit=4, inception_splits=2)
    result = evaluate(settings)
    found = result["metrics"]["inception"]
    rows = pq.read_table(sorted((Path(settings.out) / "features" / "pictures").glob("*.parquet"))).to_pylist()
    expected = inception_score(np.array([row["inception_logits"] for row in rows]), splits=2, seed=settings.seed)
    assert found["inception_score"] > 1
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(expected)
    assert "Inception Score" in (Path(settings.out) / "report.html").read_text()
    sha256 = hashlib.sha256(Path(inception_weights).read_bytes()).hexdigest()
    assert result["protocol"]["features"]["inception"]["sha256"] == sha256


def test_the_reference_has_an_inception_score_of_its_own(config: Build) -> None:
    rng = np.random.default_rng(0)
    features = [
        Features(
            np.arange(20),
            [None] * 20,
            {name: rng.normal(size=(20, 5)) for name in ("clip", "inception", "inception_logits")},
        )
        for _ in range(2)
    ]
    found = compare(features[0], features[1], config(inception_splits=3))
    for prefix, each in zip(("", "reference_"), features, strict=True):
        expected = inception_score(each.columns["inception_logits"], splits=3, seed=0)
        numbers = (found["inception"][f"{prefix}inception_score{suffix}"] for suffix in ("", "_std"))
        assert tuple(numbers) == pytest.approx(expected)
    assert found["inception"]["frechet_distance"] > 0
    assert "cmmd" not in found["inception"]


def test_what_is_there_is_not_made_again_and_the_end_is_the_same(
    config: Build, evaluate: Run, make_features: Callable[..., int], tmp_path: Path
) -> None:
    evaluate(config(out=str(tmp_path / "straight")))
    settings = config()
    job = EvaluationJob.prepare(settings)
    assert make_features(job, most=3) == 3
    with pytest.raises(DataError, match="data folder"):  # the reference has no features yet
        EvaluationJob.prepare(settings).subject.folders["reference"].read(["clip"])
    (Path(settings.out) / "features" / "pictures" / "features-000003.parquet.1.tmp").write_bytes(b"half")
    again = EvaluationJob.prepare(settings)
    assert make_features(again) == sum(len(pictures.units) for pictures in again.subject.sets.values()) - 3
    again.finish()
    assert contents(Path(settings.out)) == contents(tmp_path / "straight")


def test_features_of_an_earlier_evaluation_are_a_reference(
    config: Build, evaluate: Run, clip: ClipModel, reference: str, tmp_path: Path
) -> None:
    first = evaluate(config())
    stored = f"{config().out}/features/reference"
    second = evaluate(config(out=str(tmp_path / "second"), reference=stored))
    assert second["metrics"] == first["metrics"]
    assert second["protocol"] == first["protocol"] | {"reference": second["protocol"]["reference"]}
    assert second["protocol"]["reference"]["uri"] == reference  # says what the features were made of
    assert not (tmp_path / "second" / "features" / "reference").exists()
    manifest = Path(stored) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(clip.fingerprint, "0" * 64))
    with pytest.raises(ConfigError, match=r"reference = .*: its features 'clip' are of another network"):
        EvaluationJob.prepare(config(out=str(tmp_path / "third"), reference=stored))


def test_without_a_reference_or_captions_the_rest_is_there(
    config: Build, evaluate: Run, pictures: str, tmp_path: Path
) -> None:
    alone = evaluate(config(reference=None))
    assert set(alone["metrics"]["clip"]) == {"diversity"}
    assert alone["metrics"]["clip_score"]["pictures"] == 60
    assert alone["reference"] is alone["metrics"]["reference_clip_score"] is None
    few = evaluate(config(reference=None, limit=2, out=str(tmp_path / "of_two")))
    assert few["metrics"]["clip"]["diversity"] > 0
    (tmp_path / "silent").mkdir()
    table = pq.read_table(pictures)
    captions = [caption if index % 2 else None for index, caption in enumerate(table.column("caption").to_pylist())]
    for name, column in (("silent", [None] * 60), ("half", captions)):
        (tmp_path / name).mkdir(exist_ok=True)
        changed = table.set_column(2, "caption", pa.array(column, pa.string()))
        pq.write_table(changed, tmp_path / name / "data.parquet")
    half = evaluate(config(pictures=str(tmp_path / "half"), out=str(tmp_path / "of_half")))
    assert half["metrics"]["clip_score"]["pictures"] == 30
    silent = evaluate(config(pictures=str(tmp_path / "silent"), out=str(tmp_path / "of_silent")))
    assert silent["metrics"]["clip_score"] is None
    assert silent["metrics"]["clip"]["precision"] >= 0
    assert not (tmp_path / "of_silent" / "scores.parquet").exists()


def test_the_page_shows_the_best_and_the_worst(config: Build, evaluate: Run) -> None:
    settings = config(show=3)
    evaluate(settings)
    page = (Path(settings.out) / "report.html").read_text()
    rows = sorted(pq.read_table(Path(settings.out) / "scores.parquet").to_pylist(), key=lambda row: row["clip_score"])
    shown = page.split("Highest CLIP-score")[1].split("Protocol")[0].split("Lowest CLIP-score")
    for section, expected in zip(shown, (rows[-3:], rows[:3]), strict=True):
        assert section.count("<figure>") == 3
        for row in expected:
            assert f"{row['clip_score']:.3f}: {row['caption']} ({row['id']})" in section
    assert "Fréchet distance" in page
    assert settings.pictures in page


def test_the_page_says_whose_pictures_it_shows(config: Build, evaluate: Run, reference: str, tmp_path: Path) -> None:
    shown = tmp_path / "credited"
    shutil.copytree(reference, shown)
    (shown / "manifest.json").write_text(json.dumps({"attribution": "Drawn by <A>."}))
    settings = config(reference=str(shown))
    evaluate(settings)
    assert "Drawn by &lt;A&gt;." in (Path(settings.out) / "report.html").read_text()


def test_a_folder_is_of_one_protocol(config: Build, evaluate: Run, tmp_path: Path) -> None:
    evaluate(config())
    before = contents(Path(config().out))
    EvaluationJob.prepare(config(actors=7, microbatch=1))  # how fast, not what
    for changes, what in (({"seed": 1}, "settings"), ({"limit": 30}, "pictures"), ({"reference": None}, "reference")):
        with pytest.raises(ConfigError, match=rf"out = .*: was begun with {what} = .*; choose another folder"):
            EvaluationJob.prepare(config(**changes))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds files that this job did not make"):
        EvaluationJob.prepare(config(out=str(tmp_path / "used")))
    assert contents(Path(config().out)) == before


def test_bad_input_is_named(config: Build, make_features: Callable[..., int], pictures: str, tmp_path: Path) -> None:
    for field in ("pictures", "out"):
        with pytest.raises(ConfigError, match=f"{field}: required"):
            EvaluationJob.prepare(config(**{field: ""}))
    with pytest.raises(ConfigError, match="pictures: 3 pictures are too few; neighbours = 3 needs 4"):
        EvaluationJob.prepare(config(limit=3))
    with pytest.raises(ConfigError, match="pictures: 1 pictures are too few; diversity needs 2"):
        EvaluationJob.prepare(config(limit=1, reference=None))
    assert not Path(config().out).exists() or not contents(Path(config().out))
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    table = pq.read_table(broken / "data-00001.parquet")
    images = table.column("image").to_pylist()
    images[7] = images[7][:60]
    changed = table.set_column(1, "image", pa.array(images, pa.large_binary()))
    pq.write_table(changed, broken / "data-00001.parquet")
    with pytest.raises(DataError, match=r"broken': record 37: not a readable picture"):
        make_features(EvaluationJob.prepare(config(pictures=str(broken))))


def test_features_that_are_not_finite_are_refused(config: Build) -> None:
    folder = EvaluationJob.prepare(config()).subject.folders["pictures"]
    features = np.ones((3, 4), np.float32)
    features[1, 2] = np.nan
    with pytest.raises(DataError, match=r"features/pictures': record 8: its features 'clip' are not finite"):
        folder.write(0, features_table(np.array([7, 8, 9]), [None] * 3, {"clip": features}))
    assert not Path(folder.uri).exists()
