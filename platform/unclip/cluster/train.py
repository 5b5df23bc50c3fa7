"""Training workers under Ray Train: started, fed, restarted from the newest checkpoint when one dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import ray.data
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from unclip.cluster import stream
from unclip.config.resources import ResourcesConfig

WorkerFunction = Callable[[ray.data.DataIterator, int, torch.device], dict[str, Any]]
"""What a worker does with its part of the stream, its rank and its device; worker 0's answer is the run's."""

COLLECTIVE_TIMEOUT_S = 1800
"""Longest wait of a worker for the others: longer than any checkpoint takes, shorter than a night lost to a hang."""


def run_workers(
    function: WorkerFunction,
    *,
    stream_factory: Callable[[], ray.data.Dataset],
    resources: ResourcesConfig,
    use_gpu: bool,
    name: str,
    storage_path: str,
) -> dict[str, Any]:
    """Runs `function` on every worker and returns worker 0's answer.

    `stream_factory` is called anew at every start of the workers, in Ray Train's controller, so that the stream begins
    where the newest checkpoint ends. Ray Train has no checkpoints of ours to manage, so nothing is reported to it.
    Raises `ray.train.TrainingFailedError` where workers died more often than `resources.max_failures` allows.
    """
    worker_resources = {"CPU": resources.cpus_per_worker}
    if use_gpu:
        worker_resources["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        _start_worker,
        train_loop_config={"function": function, "threads": resources.threads_per_worker},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources,
            placement_strategy=resources.placement,
        ),
        run_config=RunConfig(
            name=name, storage_path=storage_path, failure_config=FailureConfig(max_failures=resources.max_failures)
        ),
        datasets={"train": stream_factory},
        dataset_config=ray.train.DataConfig(execution_options=stream.execution_options()),
    )
    answer = trainer.fit().return_value
    assert isinstance(answer, dict)
    return answer


def _start_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        # Ray gives a worker as many threads as it reserves CPUs, which on small machines are fractions of a core.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(settings["threads"] or max(1, cores // context.get_local_world_size()))
    function: WorkerFunction = settings["function"]
    return function(ray.train.get_dataset_shard("train"), context.get_world_rank(), device)
