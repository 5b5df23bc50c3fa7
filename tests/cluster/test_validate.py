"""Validation beside a real run: its records and grids, what it leaves alone, and what happens when it is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from unclip.cluster.validate import Validator
from unclip.generation.outputs import read_png
from unclip.recipes import RECIPES
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.export import full_state_dict
from unclip.training.in_process import local_batches
from unclip.training.loop import Trainer
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, prepare_run
from unclip.training.validation.log import ValidationLog
from unclip.training.validation.validate import validate

CPU = torch.device("cpu")


def prepared_run(openmoji: str, run: Path, **validation: Any) -> PreparedRun:
    """An upsampler of 4 steps, each with a checkpoint that is kept."""
    changes = {
        "run": str(run),
        "bundle": None,
        "data": {"path": f"{openmoji}/256/train"},
        "loop": {"max_steps": 4, "keep_checkpoints": 10},
        "validation": {"data": f"{openmoji}/256/heldout", "samples": 4, "rows": 2, "cpus": 0.5} | validation,
    }
    return prepare_run(RECIPES["upsampler_256"]["debug"]().merged(changes))


def train(prepared: PreparedRun, *, max_steps: int = 4) -> None:
    config: TrainConfig = prepared.config
    RunFolder(config.run).open(config)
    shorter = config.merged({"loop": {"max_steps": max_steps}})
    Trainer(shorter, rank=0, device=CPU).train(local_batches(prepared))


@pytest.fixture(scope="module")
def trained(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    """A run with all its checkpoints, trained while it was validated at every step."""
    prepared = prepared_run(openmoji, tmp_path_factory.mktemp("validated"), every_steps=1)
    with Validator(prepared):
        train(prepared)
    return prepared


def test_the_last_checkpoint_has_its_record_and_grid_and_every_step_a_line(trained: PreparedRun) -> None:
    run = RunFolder(trained.config.run)
    records = ValidationLog(run).records()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    last = records[-1]
    newest = checkpoint.latest(run.checkpoints_uri)
    assert newest is not None
    found = validate(trained.config, newest, CPU)
    assert last["metrics"] == pytest.approx(found.metrics, rel=1e-5)
    assert last["samples"] == "samples/step-00000004.png"
    page = read_png(f"{run.uri}/{last['samples']}")
    assert page.shape[0] > 2 * 256
    facts = json.loads(Path(f"{run.uri}/samples/step-00000004.json").read_text())
    assert found.grid is not None
    assert facts["captions"] == [caption for caption, _ in found.grid.rows]
    assert all("missed" in record for record in records if not record["metrics"])


def test_training_is_bitwise_what_it_is_without(trained: PreparedRun, openmoji: str, tmp_path: Path) -> None:
    alone = prepared_run(openmoji, tmp_path)
    train(alone)
    weights = []
    for prepared in (trained, alone):
        newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
        assert newest is not None
        weights.append(full_state_dict(newest, "fp32"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_what_is_settled_is_not_validated_again(trained: PreparedRun) -> None:
    before = ValidationLog(RunFolder(trained.config.run)).records()
    with Validator(trained):
        pass
    assert ValidationLog(RunFolder(trained.config.run)).records() == before


def test_a_killed_validator_is_started_again(openmoji: str, tmp_path: Path) -> None:
    """Due are step 3, and step 4 as the last one; the process is killed as soon as it is at work."""
    prepared = prepared_run(openmoji, tmp_path, every_steps=3)
    train(prepared)
    with Validator(prepared):
        deadline = time.monotonic() + 60
        while not (killed := _kill_validators()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert killed
    records = ValidationLog(RunFolder(prepared.config.run)).records()
    assert [record["step"] for record in records if record["metrics"]][-1] == 4


def test_a_run_that_fails_does_not_wait_for_its_validation(openmoji: str, tmp_path: Path) -> None:
    prepared = prepared_run(openmoji, tmp_path, every_steps=2)
    train(prepared, max_steps=2)
    with pytest.raises(RuntimeError, match="diverged"), Validator(prepared):
        raise RuntimeError("diverged")
    assert ValidationLog(RunFolder(prepared.config.run)).records() == []


def _kill_validators() -> int:
    count = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Actor.validate" in process.name() + " ".join(process.cmdline()):
                process.kill()
                count += 1
        except psutil.NoSuchProcess:
            continue
    return count
