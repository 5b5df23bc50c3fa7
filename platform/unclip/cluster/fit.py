"""One training run from its configuration to its stage in the bundle: checks, claims, trains, exports."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import ray.data
import ray.train
import torch

from unclip.cluster import preflight, session, stream
from unclip.cluster.progress import ProgressWatcher
from unclip.cluster.train import run_workers
from unclip.config.base import ConfigError
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, check_outputs, prepare_run
from unclip.utils import storage
from unclip.utils.memory import keep_freed_memory


def check(config: TrainConfig) -> PreparedRun:
    """Everything that can be wrong with a run, found without claiming a resource or leaving a file.

    Raises `ConfigError`, `DataError`, `BundleError`, `PreflightError` or `OSError`, each naming what to change.
    """
    prepared = _prepare(config)
    preflight.check_without_claiming(config.resources, clip_in_stream=_clip_pool(prepared) is not None)
    return prepared


def fit(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on with, the run that `config` describes and exports its stage; returns the run's summary.

    A run that is finished is not trained again. Raises what `check` raises, and `ray.train` errors where workers died
    more often than `resources.max_failures` allows.
    """
    prepared = _prepare(config)
    config, run = prepared.config, RunFolder(prepared.config.run)
    summary = run.summary()
    if summary is None or not _is_finished(summary, config):
        with session.session():
            preflight.check_resources(config.resources, clip_in_stream=_clip_pool(prepared) is not None)
            run.open(config)
            summary = _train(prepared, run)
            summary["data"] = prepared.data_report(summary["samples_seen"])
        run.finish(summary)
    if config.bundle is not None:
        publish(config)
    return summary


def _prepare(config: TrainConfig) -> PreparedRun:
    _refuse_lost_paths(config)
    prepared = prepare_run(config)
    check_outputs(prepared.config)
    return prepared


def _train(prepared: PreparedRun, run: RunFolder) -> dict[str, Any]:
    config = prepared.config
    use_gpu = preflight.uses_gpu(config.resources, preflight.cluster_nodes())
    with ProgressWatcher(run.progress_uri, config.stage):
        return run_workers(
            partial(_worker, prepared=prepared),
            stream_factory=partial(_dataset, prepared),
            resources=config.resources,
            use_gpu=use_gpu,
            name=config.stage,
            storage_path=storage.join(run.uri, "ray"),
        )


def _worker(shard: ray.data.DataIterator, rank: int, device: torch.device, *, prepared: PreparedRun) -> dict[str, Any]:
    """What each training process does."""
    if device.type == "cpu":
        keep_freed_memory()
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    plan = _plan(prepared, newest)
    # The stream starts before the model is built, so that the first batch is there when training is.
    batches = iter(()) if plan is None else stream.batches(shard, plan, rank, pin_memory=device.type == "cuda")
    trainer = Trainer(prepared.config, rank=rank, device=device)
    if newest is not None:
        trainer.resume(newest)
    return trainer.train(batches)


def _dataset(prepared: PreparedRun) -> ray.data.Dataset:
    """The stream from the newest checkpoint on; Ray Train asks for it at every start of the workers."""
    plan = _plan(prepared, checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri))
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
    )


def _is_finished(summary: dict[str, Any], config: TrainConfig) -> bool:
    limit = config.loop.time_limit_s
    return summary["step"] >= config.loop.max_steps or (limit is not None and summary["seconds"] >= limit)


def _refuse_lost_paths(config: TrainConfig) -> None:
    """A submitted job runs in a temporary folder of the head node: what it wrote there would be gone with it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    for field, uri in ({"run": config.run, "bundle": config.bundle} | config.data.paths).items():
        if uri and storage.is_local(uri) and not os.path.isabs(uri.removeprefix("file://")):
            raise ConfigError(f"{field} = {uri!r}: a submitted job needs an absolute path or an s3:// address")
