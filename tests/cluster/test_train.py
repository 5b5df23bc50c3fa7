"""Workers under Ray Train: connected, fed, and started again from where the run stands when one is killed."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import distributed

from unclip.cluster import stream
from unclip.cluster.group import Group
from unclip.cluster.restarts import Restarts
from unclip.cluster.train import run_workers
from unclip.config.resources import ResourcesConfig
from unclip.data.batches import BatchSpec
from unclip.data.manifest import scan
from unclip.data.order import RunOrder
from unclip.training.run_folder import RunFolder

BATCH, STEPS, KILLED_AT = 12, 12, 7


def make_run(records: str, folder: Path) -> Any:
    """A loop that sums the ids it is fed over all workers and stores where it stands after every third step."""
    manifest = scan(records, ("id", "image"))
    order = RunOrder([[f.rows for f in manifest.fragments]], seed=1, global_batch_size=BATCH, chunk_rows=36)
    state_file, killed_file = folder / "state.json", folder / "killed"

    def state() -> dict[str, Any]:
        return json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "sums": []}

    def plan() -> stream.StreamPlan:
        start = state()["step"] * BATCH
        return stream.StreamPlan((manifest,), order, BatchSpec(image_size=8), 2, start, STEPS * BATCH)

    def worker(shard: ray.data.DataIterator, rank: int, device: torch.device) -> dict[str, Any]:
        now = state()
        started_at = now["step"]
        for batch in stream.batches(shard, plan(), rank):
            total = batch["id"].sum()
            distributed.all_reduce(total)
            now = {"step": now["step"] + 1, "sums": [*now["sums"], int(total)]}
            if rank == 1 and now["step"] == KILLED_AT and not killed_file.exists():
                killed_file.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if now["step"] % 3 == 0:
                distributed.barrier()  # nobody reads the old state any more
                if rank == 0:
                    state_file.write_text(json.dumps(now))
        return {**now, "stopped": None, "started_at": started_at, "rank": rank, "threads": torch.get_num_threads()}

    return worker, lambda: stream.build_dataset(plan())


def test_a_killed_worker_costs_the_steps_since_the_last_state(records: str, tmp_path: Path) -> None:
    worker, dataset = make_run(records, tmp_path)
    run = RunFolder(str(tmp_path / "run"))
    restarts = Restarts(run, "decoder", max_failures=1)

    def run_group() -> dict[str, Any]:
        group = Group()
        restarts.begin(2)
        return run_workers(
            worker,
            stream_factory=dataset,
            resources=ResourcesConfig(num_workers=2, threads_per_worker=3),
            use_gpu=False,
            group=group,
        )

    answer = restarts.until_finished(run_group)
    assert (tmp_path / "killed").exists()
    (line,) = run.lines(run.restarts_uri)
    assert (line["kind"], line["world_size"], line["step"]) == ("failure", 2, 0)
    assert "worker" in line["reason"]
    assert answer["rank"] == 0
    assert answer["started_at"] == KILLED_AT // 3 * 3
    assert answer["threads"] == 3
    manifest = scan(records)
    order = RunOrder([[f.rows for f in manifest.fragments]], seed=1, global_batch_size=BATCH, chunk_rows=36)
    first_id = np.cumsum([0, *(f.rows for f in manifest.fragments)])
    ids: list[int] = []
    for chunk in map(order.chunk, range(order.chunk_of(STEPS * BATCH - 1) + 1)):
        rows = np.concatenate([first_id[f] + np.arange(start, stop) for f, start, stop in chunk.slices[0]])
        ids.extend(rows[chunk.permutation])
    truth = np.array(ids)[: STEPS * BATCH].reshape(STEPS, BATCH).sum(axis=1)
    assert answer["sums"] == truth.tolist()


def _fail(shard: ray.data.DataIterator, rank: int, device: torch.device, *, message: str) -> dict[str, Any]:
    raise ValueError(message)


def test_an_error_in_a_worker_reaches_the_driver(records: str, tmp_path: Path) -> None:
    _, dataset = make_run(records, tmp_path)
    with pytest.raises(ray.train.TrainingFailedError, match="that went wrong"):
        run_workers(
            partial(_fail, message="that went wrong"),
            stream_factory=dataset,
            resources=ResourcesConfig(max_failures=0),
            use_gpu=False,
            group=Group(),
        )
