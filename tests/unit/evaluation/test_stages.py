"""Evaluations of a prior and of an upsampler without a cluster: every number is that of every record's own sample."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.unit.evaluation.conftest import write_records
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.data.decode import decode_image
from unclip.data.manifest import DataError
from unclip.data.transforms import area_downscale, resize_square
from unclip.evaluation import pictures as rooms
from unclip.evaluation.config import EvaluateConfig, EvaluatePriorConfig, EvaluateUpsamplerConfig
from unclip.evaluation.fidelity import structural_similarity
from unclip.evaluation.job import EvaluationJob
from unclip.evaluation.prior_metrics import prior_metrics
from unclip.models.clip import ClipModel, Tokenizer
from unclip.models.upsampler import UpsamplerModel, upsample_low_res
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import PriorStage, PriorStageConfig, UpsamplerStage, UpsamplerStageConfig
from unclip.training.in_process import embed_here
from unclip.utils.random import SampleGenerator

Run = Callable[[EvaluateConfig], dict[str, Any]]
SEED = 3


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, clip_source: str) -> str:
    """24 embedded records of 20 captions."""
    folder = tmp_path_factory.mktemp("held_out")
    ids = range(100, 124)
    plain = write_records(folder / "plain", ids, [f"drawing {record % 20}" for record in ids], group=7, size=(48, 40))
    return embed_here(plain, str(folder / "embedded"), clip_source)


def rows_of(folder: str) -> list[dict[str, Any]]:
    return [row for path in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def of_prior(records: str, tiny_bundle: str, tmp_path: Path) -> Callable[..., EvaluatePriorConfig]:
    def build(**fields: Any) -> EvaluatePriorConfig:
        given = {"bundle": tiny_bundle, "records": records, "out": str(tmp_path / "prior"), "seed": SEED}
        return EvaluatePriorConfig.from_dict(given | {"resamples": 100, "show": 3} | fields)

    return build


@pytest.fixture
def of_upsampler(records: str, tiny_bundle: str, tmp_path: Path) -> Callable[..., EvaluateUpsamplerConfig]:
    def build(**fields: Any) -> EvaluateUpsamplerConfig:
        given = {"bundle": tiny_bundle, "records": records, "out": str(tmp_path / "upsampler"), "seed": SEED}
        return EvaluateUpsamplerConfig.from_dict(given | {"resamples": 100, "show": 3} | fields)

    return build


def test_a_prior_is_judged_by_the_sample_of_each_caption(
    of_prior: Callable[..., EvaluatePriorConfig], evaluate: Run, records: str, tiny_bundle: str
) -> None:
    config = of_prior(microbatch=5, options={"num_inference_steps": 2})
    result = evaluate(config)
    bundle = Bundle.load(tiny_bundle)
    stage_config = bundle.configs["prior"]
    assert isinstance(stage_config, PriorStageConfig)
    stage = PriorStage(stage_config, bundle.load_model("prior"))
    sampling = stage_config.sampling.merged({"num_inference_steps": 2})
    rows = rows_of(records)
    z_i, z_t = (
        functional.normalize(torch.tensor([row[name] for row in rows]).float(), dim=1)
        for name in ("image_embed", "text_embed")
    )
    samples = []
    for row, text in zip(rows, z_t, strict=True):
        streams = SampleGenerator.for_samples(SEED, torch.tensor([row["id"]])).child("sample")
        tokens = torch.from_numpy(Tokenizer(None)([row["caption"]], 16)).long()
        with torch.no_grad():
            samples.append(stage.sample(text[None], tokens, streams, sampling=sampling)[0].numpy())
    captions = [row["caption"] for row in rows]
    expected = prior_metrics(np.array(samples), z_i.numpy(), z_t.numpy(), captions, resamples=100, seed=SEED)
    assert result["records"] == 24
    for name, numbers in expected.items():
        assert result["metrics"][name] == pytest.approx(numbers, abs=1e-5), name
    found = pq.read_table(Path(config.out) / "captions.parquet").to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["cosine_image"] for row in found] == pytest.approx(
        (np.array(samples) * z_i.numpy()).sum(axis=1), abs=1e-5
    )
    assert result["protocol"]["bundle"] == {"uri": tiny_bundle, "digest": bundle.digest}
    assert result["protocol"]["sampling"]["prior"] == sampling.to_dict()
    page = (Path(config.out) / "report.html").read_text()
    assert page.count("<img alt=") == 3 * 4
    assert "drawing 0 (100), rank" in page


def test_an_upsampler_is_judged_by_the_sample_of_each_picture(
    of_upsampler: Callable[..., EvaluateUpsamplerConfig],
    evaluate: Run,
    records: str,
    tiny_bundle: str,
    clip_source: str,
    clip: ClipModel,
) -> None:
    config = of_upsampler(clip=clip_source, microbatch=5)
    result = evaluate(config)
    bundle = Bundle.load(tiny_bundle)
    stage_config, model = bundle.configs["upsampler_256"], bundle.load_model("upsampler_256")
    assert isinstance(stage_config, UpsamplerStageConfig)
    assert isinstance(model, UpsamplerModel)
    stage = UpsamplerStage(stage_config, model)
    table = {row["id"]: row for row in pq.read_table(Path(config.out) / "pictures.parquet").to_pylist()}
    samples = {}
    for row in rows_of(records):
        real = resize_square(decode_image(row["image"], target=32), 32)
        low_res = to_signed(torch.tensor(area_downscale(real, 16))[None])
        streams = SampleGenerator.for_samples(SEED, torch.tensor([row["id"]])).child("sample")
        with torch.no_grad():
            sample = to_uint8(stage.sample(low_res, streams, sampling=stage_config.sampling))[0].numpy()
        smooth = to_uint8(upsample_low_res(low_res, (32, 32)))[0].numpy()
        samples[row["id"]] = sample
        for suffix, picture in (("", sample), ("_interpolated", smooth)):
            numbers = table[row["id"]]
            error = np.square(picture.astype(float) - real).mean()
            assert numbers[f"psnr{suffix}"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
            expected = structural_similarity(torch.tensor(picture)[None], torch.tensor(real.copy())[None]).item()
            assert numbers[f"ssim{suffix}"] == pytest.approx(expected, abs=1e-3)
            drift = (picture.astype(float) - real).mean(axis=(0, 1))
            assert [numbers[f"{name}{suffix}"] for name in ("red", "green", "blue")] == pytest.approx(drift, abs=1e-2)
            cosine = float(clip.encode_image(picture[None])[0] @ clip.encode_image(real[None])[0])
            assert numbers[f"clip_distance{suffix}"] == pytest.approx(1 - cosine, abs=1e-3)
    assert set(result["metrics"]) == {"psnr", "ssim", "red", "green", "blue", "saturation", "clip_distance"}
    psnr, plain = (np.array([row[name] for row in table.values()]) for name in ("psnr", "psnr_interpolated"))
    found = result["metrics"]["psnr"]
    assert (found["mean"], found["interpolated_mean"]) == pytest.approx((psnr.mean(), plain.mean()))
    assert found["difference_mean"] == pytest.approx((psnr - plain).mean())
    assert found["difference_low"] < found["difference_mean"] < found["difference_high"]
    kept = [
        row
        for path in sorted((Path(config.out) / "features" / "records").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    shown = {row["id"]: np.asarray(Image.open(io.BytesIO(row["sample"]))) for row in kept if row["sample"] is not None}
    assert list(shown) == [100, 112, 123]
    assert all(np.abs(picture.astype(int) - samples[record]).max() <= 1 for record, picture in shown.items())
    assert (Path(config.out) / "report.html").read_text().count("<img alt=") == 3 * 4


def test_interpolation_loses_nothing_of_flat_pictures(
    of_upsampler: Callable[..., EvaluateUpsamplerConfig], evaluate: Run, tmp_path: Path
) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (64, 64), (30, 120, 200)).save(sink, "PNG")
    (tmp_path / "flat").mkdir()
    pq.write_table(pa.table({"id": [1, 2, 3], "image": [sink.getvalue()] * 3}), tmp_path / "flat" / "data.parquet")
    found = evaluate(of_upsampler(records=str(tmp_path / "flat")))["metrics"]
    assert found["psnr"]["interpolated_mean"] == 100
    assert found["ssim"]["interpolated_mean"] == pytest.approx(1)
    assert found["red"]["interpolated_mean"] == found["saturation"]["interpolated_mean"] == 0
    assert found["psnr"]["mean"] < 30  # the network's weights are random


def test_what_is_there_is_not_made_again_and_neither_units_nor_batches_change_the_end(
    of_prior: Callable[..., EvaluatePriorConfig],
    of_upsampler: Callable[..., EvaluateUpsamplerConfig],
    evaluate: Run,
    make_features: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for build in (of_prior, of_upsampler):
        straight = tmp_path / "straight" / build().out.rsplit("/", 1)[-1]
        whole = evaluate(build(out=str(straight)))
        config = build()
        assert make_features(EvaluationJob.prepare(config), most=2) == 2
        again = EvaluationJob.prepare(config)
        assert make_features(again) == len(again.subject.sets["records"].units) - 2
        again.finish()
        assert contents(Path(config.out)) == contents(straight)
        monkeypatch.setattr(rooms, "UNIT_ROWS", 3)
        other = evaluate(build(out=str(straight) + "-other", microbatch=2))
        monkeypatch.undo()
        for name, numbers in whole["metrics"].items():
            assert other["metrics"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-3), name


def test_units_of_large_pictures_are_small(
    of_upsampler: Callable[..., EvaluateUpsamplerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "UNIT_BYTES", 4 * 3 * (32**2 + 16**2))
    (records,) = EvaluationJob.prepare(of_upsampler()).subject.sets.values()
    assert max(len(unit.rows) for unit in records.units) == 4
    assert records.rows == 24


def test_bad_input_is_named(
    of_prior: Callable[..., EvaluatePriorConfig],
    of_upsampler: Callable[..., EvaluateUpsamplerConfig],
    pictures: str,
    records: str,
    clip_source: str,
    tmp_path: Path,
) -> None:
    for field in ("bundle", "records", "out"):
        with pytest.raises(ConfigError, match=f"{field}: required"):
            EvaluationJob.prepare(of_prior(**{field: ""}))
    with pytest.raises(ConfigError, match="options: temperature"):
        EvaluationJob.prepare(of_prior(options={"temperature": 0.5}))
    with pytest.raises(DataError, match=r"records: .* has no column 'image_embed'"):
        EvaluationJob.prepare(of_prior(records=pictures))
    with pytest.raises(ConfigError, match="records: 1 are too few"):
        EvaluationJob.prepare(of_prior(limit=1))
    with pytest.raises(ConfigError, match="stage"):
        EvaluateUpsamplerConfig.from_dict({"stage": "decoder"})
    other = tmp_path / "other"
    other.mkdir()
    for name, content in contents(Path(records)).items():
        if name == "manifest.json":
            facts = json.loads(content)
            content = json.dumps(facts | {"clip": facts["clip"] | {"fingerprint": "0" * 64}}).encode()
        (other / name).write_bytes(content)
    with pytest.raises(DataError, match=r"records: .*other' has embeddings of the CLIP with fingerprint 0000"):
        EvaluationJob.prepare(of_prior(records=str(other)))
    only_clip = tmp_path / "only_clip" / "clip"
    only_clip.mkdir(parents=True)
    for name, content in contents(Path(clip_source)).items():
        (only_clip / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"bundle = .*only_clip': has no stage 'upsampler_256'; it has clip"):
        EvaluationJob.prepare(of_upsampler(bundle=str(only_clip.parent)))
    with pytest.raises(BundleError, match="is no bundle"):
        EvaluationJob.prepare(of_upsampler(bundle=str(tmp_path)))


def test_pictures_that_are_smaller_than_samples_are_no_truth(
    of_upsampler: Callable[..., EvaluateUpsamplerConfig], make_features: Callable[..., int], pictures: str
) -> None:
    with pytest.raises(DataError, match=r"pictures': record 0: has 20x24 pixels; upsampler_256 makes 32x32"):
        make_features(EvaluationJob.prepare(of_upsampler(records=pictures)))
