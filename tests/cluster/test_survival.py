"""Whole runs that lose workers end as if nothing had been; what no further attempt would mend ends them with a word."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import assert_same_end, kill_a_worker, once, step_of

from unclip.cluster.failures import RunFailed
from unclip.cluster.fit import fit
from unclip.cluster.preflight import PreflightError
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder

STEPS = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


def debug(folder: Path, name: str, openmoji: str, changes: Mapping[str, Any]) -> TrainConfig:
    places = {"run": f"{folder}/{name}", "bundle": None, "clip": None, "data": {"path": f"{openmoji}/256/train"}}
    short = {"loop": {"max_steps": STEPS, "log_every": 1}, "resources": {"num_workers": 2}}
    return RECIPES["upsampler_256"]["debug"]().merged(places).merged(short).merged(changes)


def test_a_worker_killed_at_a_random_step_leaves_no_trace(folder: Path, openmoji: str) -> None:
    chance = random.Random(5)
    step, worker = chance.randrange(2, STEPS - 8), chance.randrange(2)
    straight, killed = (debug(folder, name, openmoji, {}) for name in ("straight", "killed"))
    fit(straight)
    run = RunFolder(killed.run)
    with once(lambda: step_of(run) >= step, lambda: kill_a_worker(worker)):
        summary = fit(killed)
    assert (summary["step"], summary["world_size"]) == (STEPS, 2)
    (data,) = summary["data"]  # 26 steps of 4 of the 48 drawings: two whole epochs and the first sixth of another
    assert (data["rows"], data["left_out"], data["whole_epochs"], data["untrained"]) == (48, 0, 2, 40)
    (line,) = run.lines(run.restarts_uri)
    assert (line["kind"], line["world_size"]) == ("failure", 2)
    assert any(words in line["reason"] for words in ("the process died", "lost another worker"))
    assert line["seconds"] > 0
    assert [record["step"] for record in run.metrics()] == list(range(1, STEPS + 1))
    assert_same_end(run, RunFolder(straight.run))
    assert not Path(killed.run, "driver.json").exists()


def test_a_diverged_run_is_not_started_again(folder: Path, openmoji: str) -> None:
    settings = {"optimizer": {"learning_rate": 1e30, "warmup_steps": 0}, "loop": {"max_skipped_steps": 2}}
    config = debug(folder, "diverged", openmoji, settings).merged({"resources": {"num_workers": 1}})
    with pytest.raises(
        RunFailed, match=r"(?s)worker 0: TrainingDiverged: no finite gradient.*The run stands at"
    ) as failed:
        fit(config)
    assert "the same command goes on" in str(failed.value)
    run = RunFolder(config.run)
    assert run.lines(run.restarts_uri) == []
    assert run.summary() is None


def test_what_is_missing_is_waited_for_and_then_named(folder: Path, openmoji: str) -> None:
    crowd = {"loop": {"global_batch_size": 32, "microbatch_size": 1}, "resources": {"num_workers": 32, "wait_s": 1.0}}
    config = debug(folder, "crowd", openmoji, crowd)
    with pytest.raises(PreflightError, match=r"(?s)32 workers x 1 CPUs.*Waited \d+ s.*resources\.wait_s"):
        fit(config)
