"""Two workers train what one does at the same global batch: losses, gradients and averages, at any accumulation.

All two-process cases run in one launch; the tests compare its run folders with those of this one process. Workers that wait
for each other have a launch of their own, which they do not survive.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.embedded import save_clip
from tests.support.ranks import LAUNCHER, run_ranks

from unclip.diffusion.timestep_sampling import LossAwareTimesteps
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training import checkpoint
from unclip.training.checkpoint import FragmentReader
from unclip.training.export import full_state_dict
from unclip.training.in_process import embed_here, local_batches
from unclip.training.loop import Batches, Trainer
from unclip.training.profiling import ProfileConfig, request_profile
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, prepare_run
from unclip.training.watchdog import STALLED, describe_stalls, read_stalls
from unclip.utils import storage

GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Case:
    """A stage that two workers train with this micro-batch, and one worker with twice as much: the same pairs at once,
    which is what counts for CLIP."""

    stage: str
    microbatch: int
    steps: int = 6
    objective: Mapping[str, Any] = field(default_factory=dict)
    bad_positions: frozenset[int] = frozenset()
    """Samples whose image embedding is not finite."""
    stop_after: int | None = None
    """Two workers are asked to stop after so many steps, and go on in a second start."""
    profile_steps: int = 0


LOSS_AWARE: dict[str, Any] = {
    "loss": {"timestep_sampling": "loss_aware"},
    "stage": {"diffusion": {"num_train_timesteps": 2}, "sampling": {"num_inference_steps": 2}},
}
CASES = {
    "decoder": Case("decoder", 2),
    "decoder accumulated": Case("decoder", 1),
    # Two timesteps, so that both have their ten losses well before the end.
    "decoder loss-aware": Case("decoder", 1, steps=12, objective=LOSS_AWARE),
    "clip": Case("clip", 2),
    # All of step 3 is on worker 1: the second half of its batch.
    "decoder with a bad batch": Case("decoder", 1, bad_positions=frozenset({10, 11})),
    "decoder stopped": Case("decoder", 2, stop_after=4, profile_steps=2),
}
LOSS, GRADIENT, WEIGHT = 1e-5, 1e-5, 1e-5
"""Largest difference of a loss, relative one of a gradient's norm, and of an averaged weight: rounding of sums in another
order, which Adam's eps of 1e-6 keeps from becoming steps of full length where a gradient is nothing else."""
ROUNDING = 2.0**-22
"""Two steps of float32, relative: a bound of bits sums over all timesteps, and in the hundreds those are more than `LOSS`."""


def prepare(folder: Path, name: str, *, workers: int) -> PreparedRun:
    case = CASES[name]
    places = {
        "run": str(folder / "runs" / f"{name} x {workers}"),
        "bundle": None,
        "clip": str(folder / "clip" / "clip") if case.stage == "decoder" else None,
        "data": {"path": str(folder / "embedded")},
        "optimizer": {"eps": 1e-6, "grad_clip": 0.05, "ema_decay": 0.5},
        "resources": {"num_workers": workers},
        "objective": case.objective,
        "loop": {
            "max_steps": case.steps,
            "global_batch_size": GLOBAL_BATCH,
            "microbatch_size": case.microbatch * 2 // workers,
            "checkpoint_every_s": 600.0,
        },
    }
    return prepare_run(RECIPES[case.stage]["debug"]().merged(places))  # type: ignore[index]


class StopAfter:
    """Asks once, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def stop_reason(self) -> str | None:
        self.left -= 1
        return "resize to 1 worker" if self.left == 0 else None


def train(prepared: PreparedRun, rank: int, case: Case, signals: StopAfter | None = None) -> dict[str, Any]:
    trainer = Trainer(prepared.config, rank=rank, device=torch.device("cpu"), signals=signals)
    newest = checkpoint.latest(trainer.run.checkpoints_uri)
    if newest is not None:
        trainer.resume(newest)
    world_size = prepared.config.resources.num_workers
    batches = local_batches(prepared, rank=rank, world_size=world_size, start=trainer.clock.samples_seen)
    return trainer.train(_spoiled(batches, case.bad_positions))


def _spoiled(batches: Batches, bad_positions: frozenset[int]) -> Batches:
    for batch in batches:
        bad = torch.tensor([position in bad_positions for position in batch["position"].tolist()])
        if bad.any():
            batch["image_embed"][bad] = math.nan
        yield batch


def two_workers(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What each of the two processes runs: all cases."""
    ends = {}
    for name, case in CASES.items():
        prepared = prepare(folder, name, workers=world_size)
        run = RunFolder(prepared.config.run)
        if rank == 0:
            run.open(prepared.config)
            if case.profile_steps:
                request_profile(ProfileConfig(run=run.uri, steps=case.profile_steps))
        if case.stop_after is not None:
            stopped = train(prepared, rank, case, StopAfter(case.stop_after) if rank == 0 else None)
            assert stopped["step"] == case.stop_after
            assert bool(stopped["stopped"])
        ends[name] = train(prepared, rank, case)["step"]
    return ends


@pytest.fixture(scope="module")
def records(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie, beside the CLIP and the embedded records that they share."""
    root = tmp_path_factory.mktemp("workers")
    embed_here(f"{openmoji}/64/train", str(root / "embedded"), save_clip(str(root / "clip"), tiny_architecture()))
    return root


@pytest.fixture(scope="module")
def folder(records: Path) -> Path:
    """Run folders of every case with one worker and with two."""
    for name, case in CASES.items():
        train(prepare(records, name, workers=1), 0, case)
    assert run_ranks(two_workers, 2, records) == [{name: case.steps for name, case in CASES.items()}] * 2
    return records


def metrics(folder: Path, name: str, workers: int) -> list[dict[str, Any]]:
    records = RunFolder(str(folder / "runs" / f"{name} x {workers}")).metrics()
    assert [record["step"] for record in records] == list(range(1, CASES[name].steps + 1))
    return records


def averages(folder: Path, name: str, workers: int) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(RunFolder(str(folder / "runs" / f"{name} x {workers}")).checkpoints_uri)
    assert newest is not None
    assert len(newest.manifest["files"]) == workers
    return full_state_dict(newest, "ema")


def objective_state(folder: Path, name: str, workers: int) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(RunFolder(str(folder / "runs" / f"{name} x {workers}")).checkpoints_uri)
    assert newest is not None
    with FragmentReader(newest) as reader:
        return {key: reader.read_objective(key) for key in newest.manifest["objective"]}


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_loss_curve_of_one(folder: Path, name: str) -> None:
    one, two = metrics(folder, name, 1), metrics(folder, name, 2)
    assert [record.keys() - {"checkpoint_step"} for record in two] == [
        record.keys() - {"checkpoint_step"} for record in one
    ]
    counted = [(a, b) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(counted) == len(one) - bool(CASES[name].bad_positions)
    for metric in {"loss", "mse", "vlb", "accuracy"} & one[0].keys():
        for expected, found in counted:
            assert found[metric] == pytest.approx(expected[metric], abs=LOSS, rel=ROUNDING), metric
    assert [b["grad_norm"] for _, b in counted] == pytest.approx([a["grad_norm"] for a, _ in counted], rel=GRADIENT)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_averages_of_one(folder: Path, name: str) -> None:
    one, two = averages(folder, name, 1), averages(folder, name, 2)
    assert one.keys() == two.keys()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, atol=WEIGHT, rtol=0)


def test_two_workers_draw_the_timesteps_of_one(folder: Path) -> None:
    """What they learned of the losses is the same, sample by sample, though each has seen but half of them."""
    one, two = (objective_state(folder, "decoder loss-aware", workers) for workers in (1, 2))
    assert one.keys() == two.keys() == {"losses", "losses_seen"}
    assert torch.equal(one["losses_seen"], two["losses_seen"])
    assert int(one["losses_seen"].sum()) == 12 * GLOBAL_BATCH
    assert int(one["losses_seen"].min()) > 10
    torch.testing.assert_close(two["losses"], one["losses"], atol=LOSS, rtol=0)
    history = LossAwareTimesteps(2)
    history.load_state(one)
    assert abs(float(history.probabilities()[0]) - 0.5) > 0.01  # draws have left uniformity


def test_accumulation_does_not_count(folder: Path) -> None:
    """One micro-batch of four, two of two, and one or two on each of two workers: one run."""
    expected = metrics(folder, "decoder", 1)
    for workers in (1, 2):
        found = metrics(folder, "decoder accumulated", workers)
        assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=LOSS)
        reference = averages(folder, "decoder", 1)
        for key, value in averages(folder, "decoder accumulated", workers).items():
            torch.testing.assert_close(value, reference[key], atol=WEIGHT, rtol=0)


def test_a_bad_batch_is_skipped_by_all_and_its_records_are_kept(folder: Path) -> None:
    name = "decoder with a bad batch"
    prepared = prepare(folder, name, workers=1)
    third = next(itertools.islice(local_batches(prepared), 2, None))
    for workers, losses in ((1, 1), (2, 2)):
        run = RunFolder(str(folder / "runs" / f"{name} x {workers}"))
        (record,) = run.skipped()
        assert (record["step"], record["positions"]) == (3, [8, 9, 10, 11])
        assert record["ids"] == third["id"].tolist()
        assert [value is None for value in record["worker_losses"]] == ([True] if losses == 1 else [False, True])
        assert [line["skipped_steps"] for line in run.metrics()] == [0, 0, 1, 1, 1, 1]


def test_all_workers_are_profiled_in_the_same_steps(folder: Path) -> None:
    run = RunFolder(str(folder / "runs" / "decoder stopped x 2"))
    assert storage.names(run.profiles_uri) == [
        f"step-00000002-rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")
    ]


def late(rank: int, world_size: int, folder: Path) -> None:
    """Worker 1 gets its third batch two minutes late, worker 0 a second; from then on nobody waits longer than four."""

    def batches() -> Batches:
        for step, batch in enumerate(local_batches(prepared, rank=rank, world_size=world_size), start=1):
            if step == 3:
                trainer.watchdog.limit_s = 4.0
                time.sleep(120 if rank else 1)
            yield batch

    prepared = prepare(folder, "decoder", workers=world_size)
    trainer = Trainer(prepared.config.merged({"run": str(folder / "late")}), rank=rank, device=torch.device("cpu"))
    trainer.train(batches())


def test_workers_that_wait_for_each_other_end_and_say_what_for(records: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    settings = {"PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [sys.executable, str(LAUNCHER), __file__, late.__name__]
    workers = [
        subprocess.Popen(
            [*arguments, str(rank), "2", str(records), str(tmp_path)], env=os.environ | settings, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    told = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [STALLED, STALLED], told
    first, second = read_stalls(RunFolder(str(records / "late")))
    assert (first.rank, first.waiting_for, first.step) == (0, "the gradients of step 3", 2)
    assert (second.rank, second.waiting_for, second.step) == (1, "the batch of step 3", 2)
    assert "in batches" in second.stack
    assert "in _gradients" in first.stack
    assert describe_stalls([first, second]) == (
        "rank 1 waited 4 s for the batch of step 3; rank 0 waited 4 s for the gradients of step 3"
    )
    assert "rank 1 waited 4 s for the batch of step 3" in told[1]


def test_the_tolerance_is_far_below_what_training_does(folder: Path) -> None:
    for name in CASES:
        losses = [record["loss"] for record in metrics(folder, name, 1) if "loss" in record]
        assert max(losses) - min(losses) > 100 * LOSS
    trained = averages(folder, "decoder", 1)
    newest = prepare(folder, "decoder", workers=1)
    torch.manual_seed(newest.config.seed)
    initial = newest.config.objective.build().model.state_dict()
    changes = torch.cat([(trained[key] - value).abs().flatten() for key, value in initial.items()])
    assert float(changes.max()) > 100 * WEIGHT
