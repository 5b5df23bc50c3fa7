"""Runs of the loop in this process, as tests of it need them: started like a worker, looked at through the run folder."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unclip.recipes import RECIPES
from unclip.training import checkpoint
from unclip.training.checkpoint import FragmentReader
from unclip.training.in_process import local_batches
from unclip.training.loop import Batches, Trainer
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, prepare_run
from unclip.training.zero_state import KINDS

CPU = torch.device("cpu")
Records = dict[str, str]
"""Folders: `64` and `256` with pictures, `embedded` with embeddings too, and `clip`, which made those."""


def prepare(stage: str, root: Path, records: Records, **changes: Any) -> PreparedRun:
    """The stage's debug recipe with all its paths under `root`."""
    needs_clip = stage in ("prior", "decoder")
    data = records["embedded"] if needs_clip else records["64" if stage == "clip" else "256"]
    places = {
        "run": str(root / stage),
        "bundle": str(root / "bundle"),
        "data": {"path": data},
        "clip": records["clip"] if needs_clip else None,
    }
    return prepare_run(RECIPES[stage]["debug"]().merged(places).merged(changes))  # type: ignore[index]


def start(prepared: PreparedRun) -> Trainer:
    """As a worker starts: a new trainer that goes on from what the run folder holds."""
    RunFolder(prepared.config.run).open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=CPU)
    newest = checkpoint.latest(trainer.run.checkpoints_uri)
    if newest is not None:
        trainer.resume(newest)
    return trainer


def run(prepared: PreparedRun) -> dict[str, Any]:
    trainer = start(prepared)
    return trainer.train(local_batches(prepared, start=trainer.clock.samples_seen))


def stored(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint."""
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    with FragmentReader(newest) as reader:
        return {
            f"{kind}/{name}": reader.read(name, kind, 0, math.prod(shape))
            for name, shape in newest.shapes.items()
            for kind in KINDS
        }


def objective_state(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    """That of the newest checkpoint, as its manifest lists it."""
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    with FragmentReader(newest) as reader:
        return {name: reader.read_objective(name) for name in newest.manifest["objective"]}


def metrics(prepared: PreparedRun) -> list[dict[str, Any]]:
    """What was logged, without what the clock says."""
    timed = (
        "time_",
        "seconds",
        "images_per_second",
        "eta_s",
        "progress",
        "max_steps",
        "memory",
        "flops",
        "mfu",
        "checkpoint",
    )
    records = RunFolder(prepared.config.run).metrics()
    return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in records]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


LOSS_AWARE: dict[str, Any] = {
    "loss": {"timestep_sampling": "loss_aware"},
    "stage": {"diffusion": {"num_train_timesteps": 2}, "sampling": {"num_inference_steps": 2}},
}
"""Two timesteps have ten losses each after some six steps of four samples."""


def let_saves_end() -> None:
    """A process that dies takes its saves with it; this one lives on, and so do they."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(30)


def killed(batches: Batches, *, after: int) -> Batches:
    yield from itertools.islice(batches, after)
    raise RuntimeError("killed")


def spoiled(batches: Batches, bad_steps: set[int]) -> Iterator[dict[str, torch.Tensor]]:
    for step, batch in enumerate(batches):
        yield batch | {"image_embed": batch["image_embed"] * (math.nan if step in bad_steps else 1.0)}
