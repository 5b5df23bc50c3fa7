"""One group of training workers under Ray Train, from its start to its end; what comes after is for `restarts` to say."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray.data
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from unclip.cluster import stream
from unclip.cluster.group import Group
from unclip.config.resources import ResourcesConfig

WorkerFunction = Callable[[ray.data.DataIterator, int, torch.device], dict[str, Any]]
"""What a worker does with its part of the stream, its rank and its device; worker 0's answer is the group's."""

START_LIMIT_S = 900.0
"""Longest time from asking for workers to the first line of their function; Ray's own limits on parts of it are shorter."""
END_LIMIT_S = 300.0
"""Longest time from the end of worker 0's function to its answer: Ray ends the other workers, and the stream, meanwhile."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""Longest wait of a worker for the others, where the caller has no limit of its own."""
_POLL_S = 0.25


class StartError(RuntimeError):
    """The workers did not start in time."""


class EndError(RuntimeError):
    """Worker 0 had done its part, and its answer did not come in time."""


def run_workers(
    function: WorkerFunction,
    *,
    stream_factory: Callable[[], ray.data.Dataset],
    resources: ResourcesConfig,
    use_gpu: bool,
    group: Group,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    watch: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs `function` once on every worker and returns worker 0's answer.

    `stream_factory` is called in Ray Train's controller. `group` is a new one, and released at the end. `watch` is called
    several times a second while the group lives; where it raises, the group is ended and the error goes on to the caller.
    Raises `ray.train.TrainingFailedError` or `ray.exceptions.RayError` where a worker, or Ray Train's controller, failed
    or died, `StartError` where they never came to `function`, and `EndError` where they did not end after it.
    """
    with tempfile.TemporaryDirectory(prefix="unclip-ray-") as scratch:  # Ray Train has nothing of ours to keep
        trainer = TorchTrainer(
            _start_worker,
            train_loop_config={"function": function, "threads": resources.threads_per_worker, "group": group},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(collective_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=use_gpu,
                resources_per_worker=worker_resources(resources, use_gpu=use_gpu),
                placement_strategy=resources.placement,
                label_selector=resources.node_labels or None,
            ),
            run_config=RunConfig(
                name="run",
                storage_path=scratch,
                failure_config=FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
            ),
            datasets={"train": stream_factory},
            dataset_config=ray.train.DataConfig(execution_options=stream.execution_options()),
        )
        try:
            return _wait_for(trainer, group, watch)
        finally:
            group.release()


def worker_resources(resources: ResourcesConfig, *, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for one worker."""
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if use_gpu else {})


def _wait_for(trainer: TorchTrainer, group: Group, watch: Callable[[], None] | None) -> dict[str, Any]:
    """The answer. Ray Train waits in a thread, without a limit, so that this one can have limits and be interrupted."""
    ended: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()

    def fit() -> None:
        try:
            answer = trainer.fit().return_value
            assert isinstance(answer, dict)
            ended.put(answer)
        except BaseException as error:  # raised again in the thread that waits
            ended.put(error)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    started, has_started, ended_at = time.monotonic(), False, None
    while True:
        with suppress(queue.Empty):
            answer = ended.get(timeout=_POLL_S)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        has_started = has_started or group.has_started()
        if not has_started and time.monotonic() - started > START_LIMIT_S:
            raise StartError(f"the workers have not started in {START_LIMIT_S:.0f} s")
        ended_at = ended_at or (time.monotonic() if group.has_ended() else None)
        if ended_at is not None and time.monotonic() - ended_at > END_LIMIT_S:
            raise EndError(f"worker 0 was done {END_LIMIT_S:.0f} s ago, and Ray Train has not brought its answer")
        if watch is not None:
            watch()


def _start_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    context, group = ray.train.get_context(), settings["group"]
    rank = context.get_world_rank()
    if rank == 0:
        group.announce_start()
    device = get_device()
    if device.type == "cpu":
        # Ray gives a worker as many threads as it reserves CPUs, which on small machines are fractions of a core.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(settings["threads"] or max(1, cores // context.get_local_world_size()))
    function: WorkerFunction = settings["function"]
    answer = function(ray.train.get_dataset_shard("train"), rank, device)
    if rank == 0:
        group.announce_end()
    return answer
