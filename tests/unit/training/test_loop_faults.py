"""The loop on bad days: losses that are not finite, stores that fail, requests to stop; and what it tells about a run."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.loop_runs import (
    CPU,
    LOSS_AWARE,
    Records,
    killed,
    let_saves_end,
    metrics,
    objective_state,
    prepare,
    run,
    same,
    spoiled,
    start,
    stored,
)

from unclip.training import checkpoint
from unclip.training.checkpoint import CheckpointError
from unclip.training.config import TrainConfig
from unclip.training.export import full_state_dict
from unclip.training.flops import training_flops
from unclip.training.in_process import local_batches
from unclip.training.loop import Batches, Trainer, TrainingDiverged
from unclip.training.objectives import LossOutput
from unclip.training.profiling import ProfileConfig, request_profile
from unclip.training.run_folder import RunFolder, versions
from unclip.utils import storage
from unclip.utils.hardware import peak_flops


def test_a_run_without_finite_gradients_ends_with_an_error(tmp_path: Path, records: Records) -> None:
    """After three steps there are none; a run that goes on in the middle of that does not count from anew."""
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 50})
    trainer = start(prepared)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train(spoiled(killed(local_batches(prepared), after=8), set(range(3, 50))))
    let_saves_end()
    trainer = start(prepared)
    assert trainer.clock.skipped_in_a_row == trainer.clock.step - 3 > 0
    batches = spoiled(local_batches(prepared, start=trainer.clock.samples_seen), set(range(50)))
    with pytest.raises(
        TrainingDiverged, match=r"10 steps in a row, 4 to 13: .*/skipped\.jsonl; or begin a new run with init_from=/"
    ):
        trainer.train(batches)
    let_saves_end()
    diverged = stored(prepared)
    assert all(value.isfinite().all() for value in diverged.values())
    three = prepare("prior", tmp_path / "three", records, loop={"max_steps": 3})
    run(three)
    assert same(diverged, stored(three))
    assert trainer.engine.steps == 3
    skipped = RunFolder(prepared.config.run).skipped()
    assert [record["step"] for record in skipped] == list(range(4, 14))
    good = list(itertools.islice(local_batches(prepared), 13))
    assert [(record["ids"], record["positions"]) for record in skipped] == [
        (batch["id"].tolist(), batch["position"].tolist()) for batch in good[3:]
    ]
    assert all(record["worker_losses"] == [None] for record in skipped)


def test_a_run_outlives_fewer_bad_steps(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 20, "max_skipped_steps": 10, "log_every": 2})
    bad = set(range(9)) | set(range(10, 19))
    trainer = start(prepared)
    summary = trainer.train(spoiled(local_batches(prepared), bad))
    assert (summary["step"], summary["skipped_steps"], summary["skipped_in_a_row"]) == (20, 18, 0)
    assert trainer.engine.steps == 2
    assert [record["skipped_steps"] for record in metrics(prepared)] == [2, 4, 6, 8, 9, 11, 13, 15, 17, 18]
    with_loss = [record["step"] for record in metrics(prepared) if "loss" in record]
    assert with_loss == [10, 20]  # of one step each
    assert all(math.isfinite(record["loss"]) for record in metrics(prepared) if "loss" in record)
    assert len(RunFolder(prepared.config.run).skipped()) == 18


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_changes_nothing_even_where_its_gradient_is(
    tmp_path: Path, records: Records, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 of 3 has an infinite constant in its loss. The learning rate goes on with the steps, so step 3 is step 3."""
    prepared = prepare("prior", tmp_path, records, zero={"stage": zero_stage}, loop={"max_steps": 3})
    trainer = start(prepared)
    original = trainer.objective.loss

    def loss(model: Any, batch: Any, generator: Any) -> LossOutput:
        output = original(model, batch, generator)
        return LossOutput(output.loss + (math.inf if trainer.clock.step == 1 else 0.0), output.metrics)

    monkeypatch.setattr(trainer.objective, "loss", loss)
    seen: list[dict[str, torch.Tensor]] = []

    def batches() -> Batches:
        for batch in local_batches(prepared):
            let_saves_end()
            seen.append(stored(prepared) if trainer.clock.step else {})
            yield batch

    trainer.train(batches())
    assert same(seen[1], seen[2])
    assert not same(seen[2], stored(prepared))
    assert (trainer.clock.skipped_steps, trainer.engine.steps) == (1, 2)


def test_a_bad_step_teaches_loss_aware_draws_nothing(tmp_path: Path, records: Records) -> None:
    prepared = prepare("decoder", tmp_path, records, objective=LOSS_AWARE, loop={"max_steps": 3})
    start(prepared).train(spoiled(local_batches(prepared), {1}))
    state = objective_state(prepared)
    assert int(state["losses_seen"].sum()) == 8
    assert state["losses"].isfinite().all()
    (record,) = RunFolder(prepared.config.run).skipped()
    assert record["losses"] == [None] * 4


# --- being asked to stop ----------------------------------------------------------------------------------------------


class StopAfter:
    """Asks once, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def stop_reason(self) -> str | None:
        self.left -= 1
        return "preemption of node 7" if self.left == 0 else None


def test_a_run_that_is_asked_to_stop_saves_its_last_step_and_ends_as_the_straight_one(
    tmp_path: Path, records: Records
) -> None:
    changes: dict[str, Any] = {"loop": {"max_steps": 5, "checkpoint_every_s": 600.0}, "optimizer": {"warmup_steps": 3}}
    straight = prepare("prior", tmp_path / "straight", records, **changes)
    assert run(straight)["stopped"] is None
    prepared = prepare("prior", tmp_path, records, **changes)
    RunFolder(prepared.config.run).open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=CPU, signals=StopAfter(2))
    summary = trainer.train(local_batches(prepared))
    assert (summary["step"], summary["samples_seen"], summary["stopped"]) == (2, 8, "preemption of node 7")
    newest = checkpoint.latest(trainer.run.checkpoints_uri)
    assert newest is not None
    assert newest.step == 2
    summary = run(prepared)
    assert (summary["step"], summary["stopped"]) == (5, None)
    assert same(stored(prepared), stored(straight))
    assert metrics(prepared) == metrics(straight)


def test_a_run_that_is_asked_to_stop_at_its_end_has_ended(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 2})
    trainer = Trainer(prepared.config, rank=0, device=CPU, signals=StopAfter(2))
    assert trainer.train(local_batches(prepared))["stopped"] is None


# --- stores that fail, and what a run tells ---------------------------------------------------------------------------


def _without_store(batches: Batches, run_folder: RunFolder, steps: range) -> Batches:
    """Nothing can be written to the folder of checkpoints while the steps are under way."""
    folder, aside = Path(run_folder.checkpoints_uri), Path(run_folder.uri) / "aside"
    for step, batch in enumerate(batches, start=1):
        let_saves_end()
        if step == steps.start:
            folder.rename(aside)
            folder.write_text("in the way")
        if step == steps.stop:
            folder.unlink()
            aside.rename(folder)
        yield batch


def test_a_save_that_fails_is_told_and_tried_again_and_training_goes_on(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 8})
    trainer = start(prepared)
    trainer.train(_without_store(local_batches(prepared), trainer.run, range(3, 6)))
    told = {record["step"]: record.get("checkpoint_error") for record in trainer.run.metrics()}
    assert [step for step, error in told.items() if error] == [4, 5, 6]
    assert "checkpoint of step 3" in told[4]
    assert "rank 0 could not write" in told[4]
    assert {record["step"]: record["checkpoint_step"] for record in trainer.run.metrics()} == {
        1: None, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2, 7: 6, 8: 7
    }  # fmt: skip
    undisturbed = prepare("prior", tmp_path / "undisturbed", records, loop={"max_steps": 8})
    run(undisturbed)
    assert same(stored(prepared), stored(undisturbed))


def test_a_last_checkpoint_that_fails_twice_is_an_error(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 2})
    trainer = start(prepared)
    with pytest.raises(CheckpointError, match="checkpoint of step 2: rank 0 could not write its part"):
        trainer.train(_without_store(local_batches(prepared), trainer.run, range(2, 9)))


def test_a_line_of_metrics_says_what_the_machine_did(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 4, "log_every": 2})
    run(prepared)
    flops, peak = training_flops(prepared.config), peak_flops(CPU, prepared.config.zero.precision)
    assert peak is not None
    for record in RunFolder(prepared.config.run).metrics():
        shares = [value for name, value in record.items() if name.startswith("time_")]
        assert len(shares) == 7
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
        assert record["time_forward"] > 0
        assert record["time_backward"] > 0
        assert record["flops_per_second"] == pytest.approx(record["images_per_second"] * flops, rel=1e-3)
        assert record["mfu"] == pytest.approx(record["flops_per_second"] / peak, abs=1e-5)
        assert 2**26 < record["memory_bytes"] < 2**40
        assert (record["world_size"], record["skipped_steps"]) == (1, 0)
        assert "checkpoint_error" not in record


def test_steps_that_wait_for_data_say_so(tmp_path: Path, records: Records) -> None:
    def slow(batches: Batches) -> Batches:
        for batch in batches:
            time.sleep(1.0)
            yield batch

    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 2, "log_every": 1})
    summary = start(prepared).train(slow(local_batches(prepared)))
    assert summary["time_s"]["data"] >= 2.0
    for record in RunFolder(prepared.config.run).metrics():
        assert record["time_data"] > 0.2  # where TrainingWaitsForData begins


def test_checkpoints_hold_what_the_run_is(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, seed=3)
    run(prepared)
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    facts = newest.manifest["run"]
    assert TrainConfig.from_dict(facts["config"]) == prepared.config
    assert (facts["seed"], facts["versions"]) == (3, versions())


def test_a_profile_is_made_on_request(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 5})
    trainer = start(prepared)
    request_profile(ProfileConfig(run=prepared.config.run, steps=2))
    trainer.train(local_batches(prepared))
    assert not storage.exists(trainer.run.profile_request_uri)
    (trace, table) = sorted(Path(trainer.run.profiles_uri).iterdir())
    assert (trace.name, table.name) == ("step-00000002-rank-00000.json.gz", "step-00000002-rank-00000.txt")
    assert "aten::mm" in table.read_text()
    undisturbed = prepare("prior", tmp_path / "undisturbed", records, loop={"max_steps": 5})
    run(undisturbed)
    assert same(stored(prepared), stored(undisturbed))


def test_a_new_run_may_begin_with_the_weights_of_another(tmp_path: Path, records: Records) -> None:
    source = prepare("prior", tmp_path / "source", records, optimizer={"ema_decay": 0.5})
    run(source)
    newest = checkpoint.latest(RunFolder(source.config.run).checkpoints_uri)
    assert newest is not None
    still: dict[str, Any] = {"optimizer": {"learning_rate": 1e-300, "ema_decay": 0.5}, "seed": 5}
    prepared = prepare("prior", tmp_path, records, init_from=source.config.run, loop={"max_steps": 1}, **still)
    run(prepared)
    after = {name: value for name, value in stored(prepared).items() if name.startswith("fp32/")}
    expected = {f"fp32/{name}": value.flatten() for name, value in full_state_dict(newest, "ema").items()}
    assert same(after, {name: expected[name] for name in after})
