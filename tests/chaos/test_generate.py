"""A job of pictures whose processes, nodes and drivers are killed at random: every picture once, and the counts add up."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster
from tests.chaos.conftest import add_node
from tests.support.bundles import save_tiny_bundle
from tests.support.cluster import once, wait_for

from unclip.cluster import generate, makers
from unclip.cluster.failures import RunFailed
from unclip.cluster.generate import run_generate
from unclip.generation.bulk.config import GenerateConfig
from unclip.pipelines.pipeline import Pipeline

JOB = Path(__file__).parents[2] / "jobs" / "generate.py"
CHANCE = random.Random(23)
KILLS = {"maker": 14, "tally": 2, "node": 2, "driver": 3}
UNITS, ROWS = 110, 5
STEPS = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


def job_of(bundle: str, folder: Path, units: int) -> GenerateConfig:
    """Prompts in units of `ROWS`, of which the second cannot be made."""
    path = folder / "prompts.csv"
    lines = [f"{row}," + ("" if row % ROWS == 1 else f"drawing number {row}") for row in range(units * ROWS)]
    path.write_text("\n".join(["id,prompt", *lines]) + "\n")
    return GenerateConfig.from_dict(
        {
            "bundle": bundle,
            "prompts": str(path),
            "out": str(folder / "out"),
            "format": "parquet",
            "prompts_per_shard": ROWS,
            "actors": 2,
            "seed": 3,
            "options": {"decoder": {"num_inference_steps": STEPS}},
        }
    )


def makers_of(process: psutil.Process) -> list[psutil.Process]:
    return actors_of(process, "Maker")


def actors_of(process: psutil.Process, name: str) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if name in child.name() + " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def nodes_with_makers(cluster: Cluster) -> list[Any]:
    """Beside the head."""
    raylets = {node: psutil.Process(node.all_processes["raylet"][0].process.pid) for node in cluster.worker_nodes}
    return [node for node, raylet in raylets.items() if makers_of(raylet)]


def done(config: GenerateConfig) -> int:
    return len(list(Path(config.out).glob("_units/*.json")))


class Disturbed:
    """The job's command, and everything that is killed while it runs."""

    def __init__(self, cluster: Cluster, config: GenerateConfig, folder: Path) -> None:
        self._cluster, self._config = cluster, config
        self._path, self._log = folder / "config.json", folder / "log.txt"
        self._path.write_text(json.dumps(config.to_dict()))
        self._driver = self._start()
        self.kills: Counter[str] = Counter()

    def run(self) -> str:
        """To the job's end; what the last driver said."""
        plan = [kind for kind, count in KILLS.items() for _ in range(count)]
        CHANCE.shuffle(plan)
        for kind in plan:
            before = done(self._config)
            wait_for(lambda before=before: done(self._config) > before or self._driver.poll() is not None, 120)
            time.sleep(CHANCE.uniform(0.0, 1.0))
            assert self._driver.poll() is None, self._log.read_text()[-4000:]
            getattr(self, f"_kill_{kind}")()
            self.kills[kind] += 1
            print(f"kill {self.kills.total()}: {kind}, {done(self._config)} units are done", flush=True)
        assert self._driver.wait(timeout=400) == 0, self._log.read_text()[-4000:]
        return self._log.read_text()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(JOB), "--config", str(self._path)]
        environment = os.environ | {"RAY_ADDRESS": self._cluster.address}
        with self._log.open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _kill_maker(self) -> None:
        wait_for(lambda: bool(makers_of(psutil.Process())))
        CHANCE.choice(makers_of(psutil.Process())).kill()

    def _kill_tally(self) -> None:
        wait_for(lambda: bool(actors_of(psutil.Process(), "ray::Tally")))
        actors_of(psutil.Process(), "ray::Tally")[0].kill()

    def _kill_node(self) -> None:
        """kill -9 of everything on it; another one takes its place."""
        wait_for(lambda: bool(nodes_with_makers(self._cluster)))
        self._cluster.remove_node(CHANCE.choice(nodes_with_makers(self._cluster)), allow_graceful=False)
        add_node(self._cluster)

    def _kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()
        self._driver = self._start()


def assert_as_undisturbed(config: GenerateConfig, units: int) -> None:
    """Every prompt that can be made is there once, with the pixels that it has when nothing is killed."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(Path(config.out).glob("data-*.parquet"))])
    rows = [row for row in range(units * ROWS) if row % ROWS != 1]
    assert table.column("id").to_pylist() == [row * 10_000 for row in rows]
    refused = pa.concat_tables([pq.read_table(path) for path in Path(config.out).glob("quarantine/*.parquet")])
    assert sorted(refused.column("row").to_pylist()) == [row for row in range(units * ROWS) if row % ROWS == 1]
    pipeline = Pipeline.from_bundle(config.bundle, "cpu")
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        prompts = [f"drawing number {row}" for row in some]
        pictures = pipeline(prompts, [config.seed] * len(some), options=config.options).images[32]
        for content, picture in zip(table.column("image")[start : start + 50], pictures, strict=True):
            made = np.asarray(Image.open(io.BytesIO(content.as_py()))).astype(int)
            assert np.abs(made - picture).max() <= 1


def assert_counts(manifest: Mapping[str, Any], units: int) -> None:
    counts = manifest["counts"]
    assert counts["prompts"] == units * ROWS
    assert (counts["done"], counts["quarantined"], counts["pictures"]) == (
        units * (ROWS - 1),
        units,
        units * (ROWS - 1),
    )
    assert sum(shard["rows"] for shard in manifest["shards"]) == counts["pictures"]


def test_twenty_kills_and_one(cluster: Cluster, bundle: str, tmp_path: Path) -> None:
    config = job_of(bundle, tmp_path, UNITS)
    disturbed = Disturbed(cluster, config, tmp_path)
    disturbed.run()
    assert disturbed.kills == KILLS
    assert disturbed.kills.total() >= 20
    assert_counts(json.loads((Path(config.out) / "manifest.json").read_text()), UNITS)
    assert_as_undisturbed(config, UNITS)


def test_a_node_that_nothing_replaces(
    cluster: Cluster, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker waits for a place that does not come; those that are left make its units."""
    monkeypatch.setattr(generate, "STRANDED_S", 8.0)
    config = job_of(bundle, tmp_path, 16).merged({"actors": 3})

    def lose() -> None:
        cluster.remove_node(nodes_with_makers(cluster)[0], allow_graceful=False)

    with once(lambda: done(config) >= 3, lose):
        manifest = run_generate(config)
    assert_counts(manifest, 16)
    assert_as_undisturbed(config, 16)


class Doomed(makers.Maker):
    """Its process dies when it takes unit 4 in hand."""

    def _make(self, maker: Any, unit: Any) -> None:
        if unit.index == 4:
            ray.get(self._tally.take.remote(unit.index, self._process, self._node))
            psutil.Process().kill()
        super()._make(maker, unit)


def test_a_unit_that_kills_its_process_ends_the_job_with_its_number(
    cluster: Cluster, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside it are made, and all of it once the cause is gone."""
    config = job_of(bundle, tmp_path, 8)
    with monkeypatch.context() as patch:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        patch.setattr(generate, "Maker", Doomed)
        with pytest.raises(
            RunFailed, match=rf"unit 4 \(rows 20 to 24 of .*\): {makers.MOST_DEATHS} processes have died"
        ):
            run_generate(config)
    assert done(config) >= 4
    assert not (Path(config.out) / "_units" / "00004.json").exists()
    run_generate(config)
    assert_as_undisturbed(config, 8)


class Hanging(makers.Maker):
    """The first of them all has a device that hangs."""

    most_step_s = 3.0
    hung = ""

    def _make(self, maker: Any, unit: Any) -> None:
        if not Path(self.hung).exists():
            Path(self.hung).touch()
            maker._engine._engine.step = lambda: time.sleep(3600)
        super()._make(maker, unit)


def test_a_device_that_hangs_is_left_to_another_process(
    cluster: Cluster, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_of(bundle, tmp_path, 8)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(Hanging, "hung", str(tmp_path / "hung"))
    monkeypatch.setattr(generate, "Maker", Hanging)
    run_generate(config)
    assert (tmp_path / "hung").exists()
    assert_as_undisturbed(config, 8)
