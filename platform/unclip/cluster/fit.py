"""One training run from its configuration to its stage in the bundle: checks, claims, trains through failures, exports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import ray.data
import torch

from unclip.cluster import preflight, session, stream
from unclip.cluster.cost import Account, GroupMeter
from unclip.cluster.group import Group
from unclip.cluster.lease import Lease
from unclip.cluster.preflight import NOTHING, Demand, Node
from unclip.cluster.prometheus import PrometheusView
from unclip.cluster.restarts import Restarts
from unclip.cluster.room import Asking, may_come, wait_for_room
from unclip.cluster.signals import ClusterSignals
from unclip.cluster.train import run_workers
from unclip.cluster.validate import Validator
from unclip.config.resources import ResourcesConfig
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.reporting.reporter import Reporter
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, check_outputs, prepare_run
from unclip.utils.memory import keep_freed_memory

COLLECTIVE_MARGIN_S = 60.0
"""Between the watchdog, which says who waits for what, and the end that the collective operations put to themselves."""


def check(config: TrainConfig) -> PreparedRun:
    """Everything that can be wrong with a run, found without claiming a resource or leaving a file.

    Raises `ConfigError`, `DataError`, `BundleError`, `PreflightError` or `OSError`, each naming what to change.
    """
    prepared = _prepare(config)
    preflight.check_without_claiming(config.resources, **_least(prepared))
    return prepared


def fit(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on with, the run that `config` describes and exports its stage; returns the run's summary.

    A run that is finished is not trained again. Workers that die, nodes that go and come are met by new groups of workers
    from the newest checkpoint on: `cluster.restarts` has the rules.
    Raises what `check` raises, and `RunFailed` where a group ended in a way that no further one would mend.
    """
    prepared = _prepare(config)
    config, run = prepared.config, RunFolder(prepared.config.run)
    summary = run.summary_of(config.loop)
    if summary is None:
        if not session.joins_cluster():  # this machine will not grow; a cluster may
            preflight.check_resources(config.resources, **_least(prepared), nodes=preflight.local_nodes())
        with Lease(run.driver_uri, f"run = {run.uri!r}") as lease, session.session():
            run.open(config)
            return _train(prepared, run, lease)
    if config.bundle is not None:
        publish(prepared)
    return summary


def _prepare(config: TrainConfig) -> PreparedRun:
    places = {"run": config.run, "bundle": config.bundle, "validation.data": config.validation.data}
    session.refuse_lost_paths(places | config.data.paths)
    prepared = prepare_run(config)
    check_outputs(prepared.config)
    return prepared


def _least(prepared: PreparedRun) -> dict[str, Any]:
    """The least that a run can do with, as `preflight.check_resources` takes it."""
    return {
        "workers": prepared.config.worker_counts[-1],
        "clip_in_stream": _clip_pool(prepared) is not None,
        "validation": _validation_node(prepared.config),
    }


def _validation_node(config: TrainConfig) -> Node:
    return Node(config.validation.cpus, config.validation.gpus) if config.validation.every_steps else NOTHING


def _train(prepared: PreparedRun, run: RunFolder, lease: Lease) -> dict[str, Any]:
    """Groups of workers until one has finished the run."""
    config = prepared.config
    restarts = Restarts(run, config.stage, config.resources.max_failures)
    use_gpu = _uses_gpu(config.resources)
    meter = GroupMeter(Account(run.cost_uri, config.cost))
    with ExitStack() as stack:
        stack.enter_context(Reporter(config, extra_views=[PrometheusView()]))
        stack.enter_context(Validator(prepared))
        return restarts.until_finished(partial(_attempt, prepared, restarts, lease, meter, use_gpu=use_gpu))


def _uses_gpu(resources: ResourcesConfig) -> bool:
    """`preflight.uses_gpu`, where an autoscaler may bring the GPUs."""
    if preflight.uses_gpu(resources, preflight.cluster_nodes()):
        return True
    worker = preflight.demand_of(resources, use_gpu=True).worker
    return resources.use_gpu == "auto" and may_come(Demand(1, worker, labels=resources.node_labels))


def _attempt(
    prepared: PreparedRun, restarts: Restarts, lease: Lease, meter: GroupMeter, *, use_gpu: bool
) -> dict[str, Any]:
    """A group of workers and, where it finishes the run, what comes after; a store may be away then, too."""
    summary = _run_group(prepared, restarts, lease, meter, use_gpu=use_gpu)
    if summary["stopped"] is None:
        summary["data"] = prepared.data_report(summary["samples_seen"])
        summary["cost"] = meter.account.record()
        RunFolder(prepared.config.run).finish({name: value for name, value in summary.items() if name != "stopped"})
        if prepared.config.bundle is not None:
            publish(prepared)
    return summary


def _run_group(
    prepared: PreparedRun, restarts: Restarts, lease: Lease, meter: GroupMeter, *, use_gpu: bool
) -> dict[str, Any]:
    """One group, of as many workers as there is room for, from the newest checkpoint on."""
    config, resources = prepared.config, prepared.config.resources
    newest = restarts.newest_checkpoint()
    demand = preflight.demand_of(
        resources,
        use_gpu=use_gpu,
        clip_in_stream=_clip_pool(prepared) is not None,
        validation=_validation_node(config),
    )
    counts, placement = config.worker_counts, resources.placement
    count = wait_for_room(counts, demand, placement=placement, wait_s=resources.wait_s, watch=lease.check)
    group = Group()
    more = [larger for larger in counts if larger > count]
    signals = partial(ClusterSignals, group, more=more, demand=demand, placement=placement)
    prepared = replace(prepared, config=config.for_workers(count))
    plan = _plan(prepared, newest)

    larger_elsewhere = [] if placement == "STRICT_PACK" else more
    workers = Demand(count, demand.worker, labels=demand.labels)
    with (
        meter.running(group, replace(demand, workers=count)) as count_hours,
        Asking(larger_elsewhere, workers, placement=placement, there=count) as asking,
    ):

        def watch() -> None:
            lease.check()
            restarts.look(group)
            count_hours()
            asking.look_now_and_then()

        restarts.begin(count)
        return run_workers(
            partial(_worker, config=prepared.config, plan=plan, newest=newest, signals=signals),
            stream_factory=partial(_dataset, plan),
            resources=prepared.config.resources,
            use_gpu=use_gpu,
            group=group,
            collective_timeout_s=config.loop.stall_limit_s + COLLECTIVE_MARGIN_S,
            watch=watch,
        )


def _worker(
    shard: ray.data.DataIterator,
    rank: int,
    device: torch.device,
    *,
    config: TrainConfig,
    plan: stream.StreamPlan | None,
    newest: checkpoint.Checkpoint | None,
    signals: Callable[[], ClusterSignals],
) -> dict[str, Any]:
    """What each training process does."""
    if device.type == "cpu":
        keep_freed_memory()
    # The stream starts before the model is built, so that the first batch is there when training is.
    batches = iter(()) if plan is None else stream.batches(shard, plan, rank, pin_memory=device.type == "cuda")
    trainer = Trainer(config, rank=rank, device=device, signals=signals() if rank == 0 else None)
    if newest is not None:
        trainer.resume(newest)
    return trainer.train(batches)


def _dataset(plan: stream.StreamPlan | None) -> ray.data.Dataset:
    return ray.data.from_items([]) if plan is None else stream.build_dataset(plan)


def _plan(prepared: PreparedRun, newest: checkpoint.Checkpoint | None) -> stream.StreamPlan | None:
    """The samples after the newest checkpoint; None where there are none left."""
    config = prepared.config
    start_position = newest.state["samples_seen"] if newest else 0
    stop_position = config.loop.max_steps * config.loop.global_batch_size
    if start_position >= stop_position:
        return None
    return stream.StreamPlan(
        manifests=prepared.manifests,
        order=prepared.order,
        spec=prepared.spec,
        num_workers=config.resources.num_workers,
        start_position=start_position,
        stop_position=stop_position,
        data_cpus=config.resources.data_cpus,
        clip=_clip_pool(prepared),
    )


def _clip_pool(prepared: PreparedRun) -> stream.ClipPool | None:
    config = prepared.config
    if prepared.spec.clip_tokenizer is None or config.clip is None:
        return None
    return stream.ClipPool(
        config.clip,
        actors=config.resources.clip_actors,
        gpus=config.resources.clip_gpus,
        text_states="text_states" in config.objective.embedding_columns,
        node_labels=config.resources.node_labels,
    )
