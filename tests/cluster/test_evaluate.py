"""The evaluation job: the same bits from any number of actors and however it was interrupted; nothing is made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from jobs import evaluate as job
from tests.support.bundles import save_tiny_bundle

from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.preflight import PreflightError
from unclip.config.base import ConfigError
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.generation.outputs import encode_png
from unclip.training.in_process import embed_here
from unclip.utils import storage

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"
UNITS = 30


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pieces(records: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same records in 30 row groups of 4, so that the job can be stopped between many of them."""
    folder = tmp_path_factory.mktemp("pieces")
    for path in Path(records).glob("*.parquet"):
        pq.write_table(pq.read_table(path), folder / path.name, row_group_size=4)
    return str(folder)


@pytest.fixture(scope="module")
def larger_pieces(pieces: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise of 32 pixels, as large as what the tiny upsampler makes, in their place."""
    folder = tmp_path_factory.mktemp("larger_pieces")
    random = np.random.default_rng(0)
    for path in Path(pieces).glob("*.parquet"):
        table = pq.read_table(path)
        images = [encode_png(random.integers(256, size=(32, 32, 3), dtype=np.uint8), {}) for _ in range(len(table))]
        index = table.schema.get_field_index("image")
        changed = table.set_column(index, table.schema.field(index), pa.array(images, table.schema.field(index).type))
        pq.write_table(changed, folder / path.name, row_group_size=4)
    return str(folder)


@pytest.fixture(scope="module")
def base(pieces: str, more_records: str, tiny_clip: str) -> EvaluatePicturesConfig:
    settings = {"pictures": pieces, "reference": more_records, "clip": tiny_clip, "kid_subsets": 3, "resamples": 100}
    return EvaluatePicturesConfig.from_dict(settings)


@pytest.fixture(scope="module")
def undisturbed(base: EvaluatePicturesConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one actor makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_evaluate(base.merged({"out": str(out)}))
    return contents(out)


def made(out: Path) -> list[Path]:
    return sorted(out.glob("features/*/features-*.parquet"))


def wait_for_features(out: Path) -> None:
    deadline = time.monotonic() + 120
    while not made(out):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_actors_of_which_one_is_killed_make_the_same(
    base: EvaluatePicturesConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    in_the_midst: list[bool] = []

    def kill_one() -> None:
        wait_for_features(out)
        processes = psutil.Process().children(recursive=True)
        actors = [process for process in processes if "ExtractActor" in " ".join([process.name(), *process.cmdline()])]
        in_the_midst.append(len(made(out)) < UNITS)
        actors[0].kill()

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    run_evaluate(base.merged({"out": str(out), "actors": 2}))
    watcher.join(timeout=60)
    assert in_the_midst == [True]
    assert contents(out) == undisturbed


def test_a_killed_job_goes_on_where_it_stopped(
    base: EvaluatePicturesConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {name: value for name, value in base.to_dict().items() if value is not None} | {"out": str(out)}
    command = [
        sys.executable,
        str(JOB),
        *(part for item in settings.items() for part in ("--set", "{}={}".format(*item))),
    ]
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stderr=subprocess.DEVNULL)
    wait_for_features(out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in made(out)}
    assert 1 <= len(before) < len([name for name in undisturbed if "features-" in name])
    run_evaluate(base.merged({"out": str(out)}))
    assert contents(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_that_lacks_its_result_only_claims_nothing_for_features(
    base: EvaluatePicturesConfig, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Nor does it wait for a node that has all of `data_cpus`, which no node may have."""
    for name in undisturbed.keys() - {"result.json", "report.html", "scores.parquet"}:
        storage.write_bytes(f"{tmp_path}/out/{name}", undisturbed[name])
    run_evaluate(base.merged({"out": str(tmp_path / "out"), "actors": 500, "data_cpus": 500}))
    assert contents(tmp_path / "out") == undisturbed


def test_a_finished_one_answers_at_once_and_from_object_storage(
    base: EvaluatePicturesConfig, undisturbed: dict[str, bytes], object_store: str
) -> None:
    places = {name: f"{object_store}/evaluate/{name}" for name in ("pictures", "reference", "out")}
    for name in ("pictures", "reference"):
        for path in Path(getattr(base, name)).glob("*.parquet"):
            storage.write_bytes(f"{places[name]}/{path.name}", path.read_bytes())
    config = base.merged(places)
    first = run_evaluate(config)
    assert first["metrics"] == json.loads(undisturbed["result.json"])["metrics"]
    for set_name in ("pictures", "reference"):
        folder = f"{places['out']}/features/{set_name}"
        for name in storage.names(folder):
            if name.startswith("features-"):
                assert storage.read_bytes(f"{folder}/{name}") == undisturbed[f"features/{set_name}/{name}"]
    storage.remove(f"{places['out']}/features")
    assert run_evaluate(config) == first
    assert not storage.exists(f"{places['out']}/features")


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


@pytest.mark.parametrize("recipe", ["prior", "upsampler"])
def test_stages_are_judged_the_same_by_any_number_of_actors_and_in_any_pieces(
    recipe: str, larger_pieces: str, tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = embed_here(larger_pieces, str(tmp_path / "records"), f"{tiny_bundle}/clip")
    settings = {"bundle": tiny_bundle, "records": records, "limit": 40, "resamples": 100, "show": 3}

    def arguments(out: Path, actors: int) -> list[str]:
        given = settings | {"out": str(out), "actors": actors}
        return ["--recipe", recipe, *(part for item in given.items() for part in ("--set", "{}={}".format(*item)))]

    alone, two = tmp_path / "alone", tmp_path / "two"
    assert job.main(arguments(alone, 1)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (printed[0], printed[-1]) == ("40 records", f"{alone}/report.html")
    expected = contents(alone)
    made = [name for name in expected if "features-" in name]
    for name in ["protocol.json", *made[::2]]:  # what a killed job leaves
        storage.write_bytes(f"{two}/{name}", expected[name])
    assert job.main([*arguments(two, 2), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"40 records would be judged, in {two}\n"
    assert job.main(arguments(two, 2)) == 0
    assert contents(two) == expected


def test_the_job_says_what_it_found(
    base: EvaluatePicturesConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = base.merged({"out": str(tmp_path / "out")}).to_dict()
    (tmp_path / "job.json").write_text(json.dumps(settings))
    assert job.main(["--config", str(tmp_path / "job.json"), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"120 pictures would be judged against 50, in {tmp_path}/out\n"
    assert contents(tmp_path / "out") == {}
    assert job.main(["--config", str(tmp_path / "job.json"), "--set", "limit=40", "--set", "reference=null"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    assert printed[0] == "40 pictures"
    assert printed[1] == f"  clip: diversity {found['clip']['diversity']:.6g}"
    assert printed[2].startswith(f"  clip_score: pictures 40, mean {found['clip_score']['mean']:.6g}, low ")
    assert printed[-1] == f"{tmp_path}/out/report.html"


def test_bad_input_is_refused_with_its_name(
    base: EvaluatePicturesConfig, records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="clip: required"):
        run_evaluate(base.merged({"out": str(tmp_path / "out"), "clip": ""}))
    with pytest.raises(PreflightError, match="does not fit the cluster"):
        run_evaluate(base.merged({"out": str(tmp_path / "out"), "actors": 500}), dry_run=True)
    table = pq.read_table(Path(records) / "part-0.parquet")
    images = table.column("image").to_pylist()
    images[23] = images[23][:40]
    (tmp_path / "broken").mkdir()
    broken = table.set_column(1, "image", pa.array(images, pa.large_binary()))
    pq.write_table(broken, tmp_path / "broken" / "shard.parquet", row_group_size=16)
    settings = base.merged({"pictures": str(tmp_path / "broken"), "out": str(tmp_path / "out")}).to_dict()
    (tmp_path / "job.json").write_text(json.dumps(settings))
    assert job.main(["--config", str(tmp_path / "job.json")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate: '")]
    assert ["broken': record 23: not a readable picture" in line for line in said] == [True]
    assert not (tmp_path / "out" / "result.json").exists()
