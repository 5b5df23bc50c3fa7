"""The generation job: every prompt once, with the pictures of the Python call, however often its processes are killed."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.support.bundles import save_tiny_bundle

from unclip.cluster import generate, makers
from unclip.cluster.failures import RunFailed
from unclip.cluster.generate import run_generate
from unclip.cluster.makers import MOST_DEATHS, Sign, Tally
from unclip.cluster.preflight import PreflightError
from unclip.config.base import ConfigError
from unclip.generation.bulk.config import GenerateConfig
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage

JOB = Path(__file__).parents[2] / "jobs" / "generate.py"
PROMPTS = [f"drawing number {number}" for number in range(40)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture
def config(bundle: str, prompts: str, tmp_path: Path) -> GenerateConfig:
    """40 prompts in 10 units, which last long enough to be disturbed."""
    return GenerateConfig.from_dict(
        {
            "bundle": bundle,
            "prompts": prompts,
            "out": str(tmp_path / "out"),
            "format": "parquet",
            "prompts_per_shard": 4,
            "options": {"decoder": {"num_inference_steps": 20}},
        }
    )


def made(out: str) -> pa.Table:
    """All pictures, in the order of the shards."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(Path(out).glob("data-*.parquet"))])


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def assert_all_there_once(out: str, bundle: str, steps: int = 20) -> None:
    """Every prompt has its picture, once, and it is the one that `Pipeline` makes."""
    table = made(out)
    assert table.column("prompt").to_pylist() == PROMPTS
    assert len(set(table.column("id").to_pylist())) == len(PROMPTS)
    options = GenerateConfig.from_dict({"options": {"decoder": {"num_inference_steps": steps}}}).options
    expected = Pipeline.from_bundle(bundle, "cpu")(PROMPTS, [0] * len(PROMPTS), options=options).images[32]
    for content, picture in zip(table.column("image").to_pylist(), expected, strict=True):
        assert np.abs(pixels(content) - picture).max() <= 1


def maker_processes(root: psutil.Process | None = None) -> list[psutil.Process]:
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        try:
            if "Maker" in process.name() + " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def receipts(out: str) -> list[Path]:
    return sorted(Path(out).glob("_units/*.json"))


@contextmanager
def killing(out: str, kills: int, chance: random.Random) -> Iterator[list[int]]:
    """kill -9 of a maker as often, a random while after it began or another unit was done; the receipts at each kill."""
    done: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        before = -1
        while len(done) < kills and not stop.is_set():
            alive = maker_processes()
            if alive and len(receipts(out)) > before:
                time.sleep(chance.uniform(0.0, 0.5))
                before = len(receipts(out))
                chance.choice(alive).kill()
                done.append(before)
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield done
    stop.set()
    thread.join()


def test_pictures_are_those_of_the_python_call_though_makers_are_killed(config: GenerateConfig, bundle: str) -> None:
    with killing(config.out, 2, random.Random(5)) as kills:
        manifest = run_generate(config)
    assert len(kills) == 2
    assert kills[-1] < 10  # in the midst of it
    assert manifest["counts"] == {
        "prompts": 40,
        "done": 40,
        "quarantined": 0,
        "pictures": 40,
        "candidates": 40,
        "reasons": {},
    }
    assert manifest["submission"]["cpu_hours"] > 0
    assert_all_there_once(config.out, bundle)
    assert not storage.exists(f"{config.out}/{makers.DRIVER_FILE}")


def test_a_killed_driver_and_the_same_command_again(config: GenerateConfig, bundle: str) -> None:
    path = Path(config.out).parent / "config.yaml"
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(JOB), "--config", str(path)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: storage.exists(f"{config.out}/{makers.DRIVER_FILE}"))
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"is being worked at by process {driver.pid} on" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    wait_for(lambda: len(receipts(config.out)) >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in receipts(config.out)}
    assert 2 <= len(finished) < 10
    assert not (Path(config.out) / "manifest.json").exists()
    run_generate(config)
    assert_all_there_once(config.out, bundle)
    assert {name: (Path(config.out) / "_units" / name).stat().st_mtime_ns for name in finished} == finished
    again = run_generate(config)
    assert again == json.loads((Path(config.out) / "manifest.json").read_text())


def test_from_object_storage_to_object_storage_and_what_cannot_be_made_is_counted(
    config: GenerateConfig, bundle: str, object_store: str
) -> None:
    for path in Path(bundle).rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{object_store}/tiny/{path.relative_to(bundle)}", path.read_bytes())
    rows = ["prompt,n,seed", "a,2,", ",,", "b,x,", "c,,-1", 3000 * "d" + ",,", "e,,9"]
    storage.write_bytes(f"{object_store}/some.csv", "\n".join(rows).encode())
    places = {
        "bundle": f"{object_store}/tiny",
        "prompts": f"{object_store}/some.csv",
        "out": f"{object_store}/pictures",
    }
    manifest = run_generate(config.merged(places | {"actors": 2}))
    counts = manifest["counts"]
    assert (counts["prompts"], counts["done"], counts["quarantined"], counts["pictures"]) == (6, 2, 4, 3)
    assert counts["reasons"] == {"bad_parameters": 2, "empty": 1, "too_long": 1}
    folder = places["out"]
    contents = [storage.read_bytes(f"{folder}/{shard['file']}") for shard in manifest["shards"]]
    table = pa.concat_tables([pq.read_table(io.BytesIO(content)) for content in contents])
    assert list(zip(table.column("prompt").to_pylist(), table.column("seed").to_pylist(), strict=True)) == [
        ("a", 0),
        ("a", 1),
        ("e", 9),
    ]
    refused = [storage.read_bytes(f"{folder}/quarantine/{name}") for name in storage.names(f"{folder}/quarantine")]
    rows_refused = pa.concat_tables([pq.read_table(io.BytesIO(content)) for content in refused]).column("row")
    assert sorted(rows_refused.to_pylist()) == [1, 2, 3, 4]
    assert storage.exists(f"{folder}/grid.png")
    assert not storage.exists(f"{folder}/{makers.DRIVER_FILE}")


def test_a_fault_ends_the_job_with_its_words(config: GenerateConfig, bundle: str, tmp_path: Path) -> None:
    """The list shrinks between its count and its reading."""
    path = tmp_path / "list.txt"
    path.write_text("\n".join(PROMPTS))
    job = generate.BulkJob.prepare(config.merged({"prompts": str(path)}))
    path.write_text("\n".join(PROMPTS[:10]))
    with generate.Lease(f"{config.out}/{makers.DRIVER_FILE}", "out") as lease, pytest.raises(RunFailed) as failed:
        generate._make(job, job.begin(), lease)
    assert "has changed since it was listed; what is done is kept" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_what_is_wrong_is_found_before_anything_is_claimed(config: GenerateConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bundle: required"):
        run_generate(config.merged({"bundle": ""}))
    with pytest.raises(BundleError):
        run_generate(config.merged({"bundle": str(tmp_path)}))
    with pytest.raises(PreflightError, match=r"0 of 1 actors find a place") as failed:
        run_generate(config.merged({"gpus_per_actor": 1.0}))
    assert "needed: 1 actors x 1 CPUs, 1 GPUs = 1 CPUs, 1 GPUs" in str(failed.value)
    with pytest.raises(PreflightError, match=r"of 900 actors find a place") as failed:
        run_generate(config.merged({"actors": 900}), dry_run=True)
    assert "this would fit: --set actors=" in str(failed.value)
    facts = run_generate(config, dry_run=True)
    assert facts == {"prompts": 40, "units": 10, "actors": 1}
    assert not receipts(config.out)


def test_the_tally_counts_deaths_and_not_lost_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makers, "living_nodes", lambda: {"here"})
    tally = Tally()
    assert tally.deaths(7, "a") == 0
    tally.take(7, "a", "here")
    tally.put_down(7, Sign("a", 1.0, 3, 3, 3, is_busy=False))
    assert tally.deaths(7, "a") == 0
    for death in range(1, 4):
        tally.take(7, f"process {death}", "here")
        assert tally.deaths(7, f"process {death + 1}") == death
        assert tally.deaths(7, f"process {death + 1}") == death  # asked again: the same death
    tally.take(7, "b", "here")
    assert tally.deaths(7, "b") == 3  # sent once more to the same process
    tally.take(7, "b", "gone")
    assert tally.deaths(7, "c") == 3
    for _ in range(MOST_DEATHS):
        tally.join("actor", "here")
    assert tally.report().failure is None
    tally.loaded("actor")
    for _ in range(MOST_DEATHS + 1):
        tally.join("actor", "here")
    assert "died while they loaded the bundle" in str(tally.report().failure)


def test_the_tally_knows_who_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(makers.time, "monotonic", lambda: now[0])
    tally = Tally()
    assert tally.beat(Sign("a", 1.0, 3, 2, 2, is_busy=True))
    now[0] = 60.0
    assert tally.beat(Sign("b", 2.0, 5, 5, 5, is_busy=False))
    report = tally.report()
    assert report.living == {"b"}
    assert report.silent_s == 60.0
    assert report.signs["a"].drawn == 3
    tally.end()
    assert not tally.beat(Sign("b", 3.0, 5, 5, 5, is_busy=False))


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
