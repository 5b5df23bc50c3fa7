"""Evaluation on a cluster: CPU tasks read and decode records, actors run networks on them, CPU tasks write what those make,
one task judges it.

What counts is on storage: a unit is done when its file is there. So processes may die, and a driver that was killed is
replaced by the same command. Metrics are computed once, over all features in the order of the records: so the result does
not depend on how many actors there were, nor on how often they were interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayError

from unclip.cluster import preflight, session, stream
from unclip.cluster.failures import RunFailed, data_errors, describe
from unclip.cluster.lease import Lease
from unclip.cluster.prometheus import JobProgress
from unclip.cluster.room import wait_for_nodes
from unclip.config.resources import ResourcesConfig
from unclip.data.batches import Batch
from unclip.evaluation.config import EvaluateConfig
from unclip.evaluation.extractors import Network, extract_all
from unclip.evaluation.feature_folder import features_table
from unclip.evaluation.job import DRIVER_FILE, EvaluationJob
from unclip.evaluation.pictures import Unit
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_ADDRESSES = ("pictures", "reference", "training", "judge", "records", "bundle", "inception", "lpips", "out")
"""Fields of configurations that hold one."""
_EXTRACTOR_CPUS = 0.99
"""Of an actor without a GPU. Not what decoders ask for: Ray Data would make one operator of both."""
_BESIDE_CPUS = 0.01
"""Of a task that others wait for, who keep their CPUs meanwhile."""


def run_evaluate(config: EvaluateConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Makes what is missing, judges it and returns the result; a dry run checks everything and returns the numbers of
    records that would be judged, by the name of their set.

    Raises `ConfigError`, `DataError`, `BundleError`, `PreflightError` or `OSError` before anything is claimed; later
    `DataError` naming the record that cannot be used, and `RunFailed` where the cluster gave up: the same command goes on
    from there.
    """
    session.refuse_lost_paths({name: getattr(config, name) for name in _ADDRESSES if hasattr(config, name)})
    job = EvaluationJob.prepare(config)
    resources = ResourcesConfig(
        cpus_per_worker=0.01, data_cpus=config.data_cpus, clip_actors=config.actors, clip_gpus=config.gpus, use_gpu="no"
    ).merged({"node_labels": config.node_labels if config.gpus else {}})
    if dry_run:
        preflight.check_without_claiming(resources, clip_in_stream=True)
        return dict(job.counts)
    with Lease(storage.join(job.config.out, DRIVER_FILE), f"out = {job.config.out!r}") as lease:
        if (result := job.result()) is not None:
            return result
        job.begin()
        try:
            with session.session(), data_errors():
                if missing := job.missing():
                    preflight.check_resources(resources, clip_in_stream=True)
                    demand = preflight.demand_of(resources, use_gpu=False, clip_in_stream=True)
                    wait_for_nodes(demand, wait_s=resources.wait_s, watch=lease.check)
                    _make_features(job, missing, lease)
                return _finish(job)
        except RayError as error:
            why = f"{describe(error)}; what is done is kept, and the same command goes on from there"
            raise RunFailed(why) from error


def _make_features(job: EvaluationJob, missing: Mapping[str, Sequence[Unit]], lease: Lease) -> None:
    left = sum(len(unit.rows) for units in missing.values() for unit in units)
    with (
        progress_bar(job.rows, "record", done=job.rows - left, title="evaluate") as bar,
        closing(JobProgress("evaluate", job.config.out)) as gauges,
    ):
        for done in _dataset(job, missing).iter_rows():
            lease.check()
            bar.update(done["rows"])
            gauges.show(bar.n, job.rows)


def _finish(job: EvaluationJob) -> dict[str, Any]:
    """On a node that has room, not beside the driver: all features are in memory there. No node may have all `data_cpus`."""
    largest = max(int(node.cpus) for node in preflight.cluster_nodes())
    finish = ray.remote(EvaluationJob.finish).options(num_cpus=max(1, min(job.config.data_cpus, largest)))
    result: dict[str, Any] = ray.get(finish.remote(job))
    return result


def _dataset(job: EvaluationJob, missing: Mapping[str, Sequence[Unit]]) -> ray.data.Dataset:
    """One row for each unit whose features were written; a task decodes the units of a row group or tar."""
    config, subject = job.config, job.subject
    tasks = [
        {"set": name, "units": [unit.number for unit in units]}
        for name, of_set in missing.items()
        for _, units in groupby(of_set, key=lambda unit: unit.fragment)
    ]
    context = stream.data_context()
    context.execution_options.preserve_order = False  # large row groups would hold up the others
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        dataset = dataset.map_batches(
            partial(_prepare, job=job),
            batch_size=None,
            num_cpus=1,
            compute=TaskPoolStrategy(size=config.data_cpus),
        )
        dataset = dataset.map_batches(
            ExtractActor,
            fn_constructor_args=(
                {name: tuple(subject.networks(name)) for name in subject.sets},
                config.microbatch,
                "cuda" if config.gpus else "cpu",
            ),
            batch_size=None,
            compute=ActorPoolStrategy(size=config.actors),
            **(
                {"num_gpus": config.gpus, "label_selector": config.node_labels}
                if config.gpus
                else {"num_cpus": _EXTRACTOR_CPUS}
            ),
        )
        return dataset.map_batches(
            partial(_write, job=job),
            batch_size=None,
            num_cpus=_BESIDE_CPUS,
            compute=TaskPoolStrategy(size=config.data_cpus),
        )


def _prepare(tasks: Batch, job: EvaluationJob) -> Iterator[Batch]:
    """A row for each unit: `_ROW`, the table being of ids and captions, and the networks' inputs."""
    for name, numbers in zip(tasks["set"].tolist(), tasks["units"].tolist(), strict=True):
        for unit in job.prepare_units(name, [job.subject.sets[name].units[number] for number in numbers]):
            records = features_table(unit.ids, unit.captions, {})
            yield _row(name, unit.number, records) | {key: array[np.newaxis] for key, array in unit.inputs.items()}


class ExtractActor:
    """Units with the networks' inputs in, the same units with what the networks made of them out."""

    def __init__(self, networks: Mapping[str, Sequence[Network]], microbatch: int, device: str) -> None:
        self._networks, self._microbatch = networks, microbatch
        for network in dict.fromkeys(network for of_set in networks.values() for network in of_set):
            network.setup(device)

    def __call__(self, units: Batch) -> Iterator[Batch]:
        for index, name in enumerate(units["set"].tolist()):
            inputs = {key: array[index] for key, array in units.items() if key not in _ROW}
            made = extract_all(self._networks[name], inputs, self._microbatch)
            records = _table(units["table"][index])
            table = features_table(records.column("id").to_numpy(), records.column("caption").to_pylist(), made)
            yield _row(name, units["unit"][index], table)


def _write(units: Batch, job: EvaluationJob) -> Iterator[Batch]:
    """Keeps each unit's features; answers with the number of its records."""
    for name, number, content in zip(units["set"].tolist(), units["unit"].tolist(), units["table"], strict=True):
        table = _table(content)
        job.write(name, number, table)
        yield {"rows": np.array([table.num_rows])}


_ROW = ("set", "unit", "table")
"""Columns of a row of Ray Data that say which unit it is, and what is known of its records."""


def _row(name: str, number: int, table: pa.Table) -> Batch:
    """The row of a unit. Its table goes as bytes, so that Ray Data sees neither texts nor columns of nothing."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = np.array([sink.getvalue().to_pybytes()], dtype=object)
    return {"set": np.array([name]), "unit": np.array([number]), "table": content}


def _table(content: bytes) -> pa.Table:
    with pa.ipc.open_stream(content) as stream:
        return stream.read_all()
