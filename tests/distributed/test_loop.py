"""Two workers train what one does at the same global batch: losses, gradients and averages, at any accumulation.

All two-process cases run in one launch; the tests compare its run folders with those of this one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.embedded import embed, save_clip
from tests.support.streams import local_batches

from unclip.diffusion.timestep_sampling import LossAwareTimesteps
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training import checkpoint
from unclip.training.checkpoint import FragmentReader
from unclip.training.export import full_state_dict
from unclip.training.loop import Trainer
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, prepare_run

GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Case:
    """A stage that two workers train with this micro-batch, and one worker with twice as much: the same pairs at once,
    which is what counts for CLIP."""

    stage: str
    microbatch: int
    steps: int = 6
    objective: Mapping[str, Any] = field(default_factory=dict)


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


def train(prepared: PreparedRun, rank: int) -> dict[str, Any]:
    trainer = Trainer(prepared.config, rank=rank, device=torch.device("cpu"))
    newest = checkpoint.latest(trainer.run.checkpoints_uri)
    if newest is not None:
        trainer.resume(newest)
    batches = local_batches(prepared, rank=rank, world_size=prepared.config.resources.num_workers)
    return trainer.train(batches)


def two_workers(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What each of the two processes runs: all cases."""
    return {name: train(prepare(folder, name, workers=world_size), rank)["step"] for name in CASES}


@pytest.fixture(scope="module")
def folder(
    openmoji: str, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[dict[str, Any]]]
) -> Path:
    """Run folders of every case with one worker and with two."""
    root = tmp_path_factory.mktemp("workers")
    embed(f"{openmoji}/64/train", str(root / "embedded"), save_clip(str(root / "clip"), tiny_architecture()))
    for name in CASES:
        train(prepare(root, name, workers=1), rank=0)
    assert run_ranks(two_workers, 2, root) == [{name: case.steps for name, case in CASES.items()}] * 2
    return root


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
    for metric in {"loss", "mse", "vlb", "accuracy"} & one[0].keys():
        expected = [record[metric] for record in one]
        assert [record[metric] for record in two] == pytest.approx(expected, abs=LOSS, rel=ROUNDING), metric
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=GRADIENT)


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


def test_the_tolerance_is_far_below_what_training_does(folder: Path) -> None:
    for name in CASES:
        losses = [record["loss"] for record in metrics(folder, name, 1)]
        assert max(losses) - min(losses) > 100 * LOSS
    trained = averages(folder, "decoder", 1)
    newest = prepare(folder, "decoder", workers=1)
    torch.manual_seed(newest.config.seed)
    initial = newest.config.objective.build().model.state_dict()
    changes = torch.cat([(trained[key] - value).abs().flatten() for key, value in initial.items()])
    assert float(changes.max()) > 100 * WEIGHT
