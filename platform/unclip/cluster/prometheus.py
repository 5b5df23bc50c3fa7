"""What a job tells about itself in Ray's metrics, which Prometheus scrapes from every node."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ray.util.metrics import Gauge

from unclip.cluster.gauges import LastingGauges
from unclip.config.cost import CostConfig
from unclip.training.config import TrainConfig
from unclip.training.reporting.run_tail import News, Record
from unclip.training.reporting.view import train_scalars, validation_scalars
from unclip.training.run_folder import RunFolder

_GPU_FAULT = re.compile(
    r"CUDA error|device-side assert|cuDNN|cuBLAS|CUBLAS_STATUS|CUDNN_STATUS|NCCL error|nccl\w*Error|uncorrectable ECC"
)
"""What PyTorch, or NCCL, says of a GPU that does not do what it should; a lack of memory is none of this."""
_DESCRIPTIONS = {
    "train/restarts": "groups of workers that ended before the run was over",
    "train/failures_in_a_row": "restarts after failures, without a newer checkpoint between them",
    "train/gpu_failures": "restarts after an error of a GPU",
    "train/newest_step_time_seconds": "when a step was last heard of, in s since 1970; at first, when the driver began",
    "train/newest_checkpoint_time_seconds": "when a checkpoint was last heard of; at first, when the driver began",
    "train/checkpoint_failed": "1 where the newest checkpoint could not be saved, else 0",
    "train/checkpoint_every_seconds": "loop.checkpoint_every_s",
    "train/stall_limit_seconds": "loop.stall_limit_s",
    "train/gpu_hours": "GPU-hours that the run has claimed, by all its drivers",
    "train/cpu_hours": "CPU-hours that the run has claimed, by all its drivers",
    "train/cost_dollars": "what these hours come to, where their prices are known",
    "train/budget_dollars": "cost.budget",
    "job/done": "how much is done, in the units that the job counts by",
    "job/expected": "how much that will be",
    "job/progress_time_seconds": "when there was progress last, in s since 1970",
    "job/gpu_hours": "GPU-hours that the job has claimed, by all its drivers",
    "job/cpu_hours": "CPU-hours that the job has claimed, by all its drivers",
    "job/cost_dollars": "what these hours come to, where their prices are known",
    "job/budget_dollars": "cost.budget",
}


class PrometheusView:
    """A run's gauges, tagged by run and stage.

    `unclip_train_NAME`, `unclip_time_NAME` (shares) and `unclip_validation_NAME` are the newest of what the run folder
    says. Ray exports them as `ray_unclip_…` from the node of the driver.
    """

    name = "Prometheus"

    def open(self, config: TrainConfig) -> None:
        self._gauges = _Gauges({"run": config.run, "stage": config.stage})
        self._restarts: list[Record] = []
        self._step = self._saved = -1
        now, run = time.time(), RunFolder(config.run)
        earlier = run.lines(run.restarts_uri)
        limits = {
            "train/newest_step_time_seconds": now,
            "train/newest_checkpoint_time_seconds": now,
            "train/checkpoint_failed": 0.0,
            "train/checkpoint_every_seconds": config.loop.checkpoint_every_s,
            "train/stall_limit_seconds": config.loop.stall_limit_s,
        }
        self._gauges.set(limits | _budget("train", config.cost) | _of_restarts(earlier, self._saved))

    def show(self, news: News) -> None:
        values: dict[str, float] = {}
        if news.records:
            values |= self._of_record(news.records[-1])
        self._restarts += news.restarts
        if news.records or news.restarts:
            values |= _of_restarts(self._restarts, self._saved)
        if news.validations:
            values |= validation_scalars(news.validations[-1])
        if news.cost:
            values |= _of_cost("train", news.cost)
        self._gauges.set(values)

    def close(self) -> None:
        """The run is over, and its gauges with it."""
        self._gauges.close()

    def _of_record(self, record: Record) -> dict[str, float]:
        values = train_scalars(record) | {"train/step": record["step"]}
        values["train/checkpoint_failed"] = float(record.get("checkpoint_error") is not None)
        saved = record.get("checkpoint_step")
        for name, number, before in (("step", record["step"], self._step), ("checkpoint", saved, self._saved)):
            if number is not None and number != before:
                values[f"train/newest_{name}_time_seconds"] = time.time()
        self._step, self._saved = record["step"], -1 if saved is None else saved
        return values


class JobProgress:
    """Gauges `unclip_job_NAME` of a job that has an end, tagged by its kind and where its results go.

    Made on a connected driver, and there until `close`.
    """

    def __init__(self, kind: str, out: str, prices: CostConfig = CostConfig()) -> None:  # noqa: B008
        self._gauges = _Gauges({"kind": kind, "out": out})
        self._done = -1.0
        self._gauges.set(_budget("job", prices))

    def show(self, done: float, total: float) -> None:
        """How much is done, in the units that the job counts by."""
        values = {"job/done": done, "job/expected": total}
        if done != self._done:
            values["job/progress_time_seconds"] = time.time()
        self._done = done
        self._gauges.set(values)

    def cost(self, record: Mapping[str, Any]) -> None:
        """What the job has claimed, as its account says."""
        self._gauges.set(_of_cost("job", record))

    def close(self) -> None:
        """The job is over, and its gauges with it."""
        self._gauges.close()


class _Gauges:
    """By `group/name`; `unclip_group_name` in Ray's metrics, with the same tags each."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        self._tags = dict(tags)
        self._made: dict[str, Gauge] = {}
        self._lasting = LastingGauges()

    def set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._made:
                self._made[name] = self._make(name)
            self._lasting.set(self._made[name], value, self._tags)

    def close(self) -> None:
        self._lasting.close()

    def _make(self, name: str) -> Gauge:
        group, metric = name.split("/", 1)
        description = _DESCRIPTIONS.get(name, f"{metric.replace('_', ' ')} of the newest {group} record")
        allowed = re.sub(r"[^a-zA-Z0-9_]", "_", f"unclip_{group}_{metric}")
        return Gauge(allowed, description=description, tag_keys=tuple(self._tags))


def _of_restarts(restarts: Sequence[Record], saved: int) -> dict[str, float]:
    """Args: saved: step of the newest checkpoint, -1 where none is known."""
    stands = max(saved, restarts[-1]["step"]) if restarts else saved
    row = takewhile(lambda line: line["kind"] == "failure" and line["step"] == stands, reversed(restarts))
    return {
        "train/restarts": len(restarts),
        "train/failures_in_a_row": len(list(row)),
        "train/gpu_failures": sum(_GPU_FAULT.search(line["reason"]) is not None for line in restarts),
    }


def _of_cost(group: str, record: Mapping[str, Any]) -> dict[str, float]:
    values = {"gpu_hours": record["gpu_hours"], "cpu_hours": record["cpu_hours"], "cost_dollars": record["dollars"]}
    return {f"{group}/{name}": value for name, value in values.items() if value is not None}


def _budget(group: str, prices: CostConfig) -> dict[str, float]:
    return {} if prices.budget is None else {f"{group}/budget_dollars": prices.budget}
