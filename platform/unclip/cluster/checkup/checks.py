"""Every check by its name: what is asked of which nodes, and how the answers are judged."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unclip.cluster import preflight
from unclip.cluster.checkup import all_reduce, clock, gpus, machine, ports, room, training, versions
from unclip.cluster.checkup import storage as store
from unclip.cluster.checkup.all_reduce import Ranks
from unclip.cluster.checkup.config import CheckName, CheckupConfig
from unclip.cluster.checkup.nodes import Place, Probes, Silence, answer_of, within
from unclip.cluster.checkup.result import Finding, failed, ok, skipped, warning
from unclip.cluster.failures import describe
from unclip.cluster.group import draining_nodes
from unclip.cluster.preflight import Demand
from unclip.training.config import TrainConfig
from unclip.utils import storage

T = TypeVar("T")
Found = Iterator[tuple[str, Finding]]
"""Findings, each with the name of the node that it concerns, or without where it concerns the cluster."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkup:
    """What the checks share.

    Args:
        labels: of the nodes that train.
        demand: what shall fit, if anything was said.
        placement: of its workers.
        refusal: why an autoscaler did not bring it.
        trial: recipe of the trial training.
    """

    config: CheckupConfig
    probes: Probes
    labels: Mapping[str, str]
    demand: Demand | None
    placement: str
    refusal: str
    trial: TrainConfig


def _nodes(checkup: Checkup) -> Found:
    places = checkup.probes.places
    yield from _silent(checkup.probes.ask(os.getpid))
    cpus, gpu_count = sum(place.cpus for place in places), sum(place.gpus for place in places)
    yield "", ok(f"{len(places)} nodes with {cpus:g} CPUs and {gpu_count:g} GPUs")
    leaving = draining_nodes()
    for place in places:
        if place.id in leaving:
            yield place.name, warning("is about to be taken away", "wait for its replacement, or end the drain")


def _versions(checkup: Checkup) -> Found:
    answers = checkup.probes.ask(versions.versions_here)
    yield from _silent(answers)
    yield from versions.compare(
        {place.name: found for place, found in answers if not isinstance(found, Silence)}
    ).items()
    file = checkup.config.requirements
    if file:
        pins = versions.read_pins(storage.read_bytes(file).decode())
        unlike = checkup.probes.ask(versions.unlike_pins, pins)
        yield from _judged(unlike, lambda _, found: versions.judge_pins(found, len(pins), os.path.basename(file)))


def _clock(checkup: Checkup) -> Found:
    answers = [(place, clock.exchange(checkup.probes, place)) for place in checkup.probes.places]
    yield from _judged(answers, lambda _, found: clock.judge_clock(found))


def _ports(checkup: Checkup) -> Found:
    targets = ports.targets_of(checkup.probes)
    yield from _judged(checkup.probes.ask(ports.unreached, targets), lambda _, found: ports.judge_ports(found, targets))


def _shared_memory(checkup: Checkup) -> Found:
    yield from _judged(
        checkup.probes.ask(machine.shared_memory),
        lambda place, total: machine.judge_shared_memory(total, place.object_store_bytes),
    )


def _spill(checkup: Checkup) -> Found:
    yield from _judged(
        checkup.probes.ask(machine.spill_disk, checkup.config.transfer_mb),
        lambda place, disk: machine.judge_spill(disk, place.object_store_bytes),
    )


def _scratch(checkup: Checkup) -> Found:
    answers = checkup.probes.ask(machine.scratch_disk, checkup.config.transfer_mb)
    yield from _judged(answers, lambda _, disk: machine.judge_scratch(disk))


def _open_files(checkup: Checkup) -> Found:
    yield from _judged(checkup.probes.ask(machine.open_files), lambda _, limits: machine.judge_open_files(*limits))


def _gpus(checkup: Checkup) -> Found:
    places = {place.name: place for place in checkup.probes.places}
    inventory = list(
        _judged(checkup.probes.ask(gpus.gpus_here), lambda place, found: gpus.judge_inventory(found, place.gpus))
    )
    if all(finding.status == "skipped" for _, finding in inventory):
        yield "", skipped("no node has a GPU")
        return
    yield from ((name, finding) for name, finding in inventory if finding.status != "skipped")
    sound = [places[name] for name, finding in inventory if finding.status != "failed" and places[name].gpus >= 1]
    free = available_resources_per_node()
    idle = [place for place in sound if free.get(place.id, {}).get("GPU", 0.0) >= place.gpus]
    for place in sound:
        if place not in idle:
            yield place.name, skipped("some of its GPUs are in use: PyTorch is not tried there")
    claims = [(place, _claim(place)) for place in idle]
    answers = [(place, answer_of(ref, checkup.config.limit_s)) for place, ref in claims]
    for _, ref in claims:
        ray.cancel(ref, force=True)
    yield from _judged(answers, lambda place, found: gpus.judge_claimed(found, place.gpus))


def _claim(place: Place) -> ray.ObjectRef:
    pinned = NodeAffinitySchedulingStrategy(place.id, soft=False)
    task = ray.remote(gpus.compute_here).options(num_cpus=0, num_gpus=int(place.gpus), scheduling_strategy=pinned)
    return task.remote()


def _storage(checkup: Checkup) -> Found:
    config, places = checkup.config, checkup.probes.places
    with _written_to(config.storage, config.limit_s) as folder:
        token = uuid.uuid4().hex
        if (trouble := within(config.limit_s, lambda: store.write_token(folder, token))) is not None:
            yield "", store.judge_storage(trouble, config.storage)
            return
        arguments = {place.id: (folder, token, place.id, config.transfer_mb) for place in places}
        answers: list[tuple[Place, Any]] = checkup.probes.ask_each(store.use, arguments)
        yield from _judged(answers, lambda _, found: store.judge_storage(found, config.storage))


def _room(checkup: Checkup) -> Found:
    if checkup.demand is None:
        yield "", skipped("neither stage nor gpus nor cpus say what shall fit")
        return
    nodes = preflight.cluster_nodes()
    yield "", room.judge_room(checkup.demand, nodes, placement=checkup.placement, refusal=checkup.refusal)


def _all_reduce(checkup: Checkup) -> Found:
    limit_s = checkup.config.limit_s
    ranks = Ranks(checkup.probes.places)
    try:
        if len(ranks.members) < 2:
            yield (
                "",
                skipped("one GPU is free in all: there is nothing to reduce" if ranks.members else "no GPU is free"),
            )
            return
        for node, ring in ranks.within_nodes(limit_s).items():
            yield node, all_reduce.judge_ring(ring, per_node=ranks.most_on_a_node(), nodes=1)
        if (widest := ranks.across_nodes(limit_s)) is not None:
            count = len({place.id for place, _ in ranks.members})
            yield "", all_reduce.judge_ring(widest, per_node=ranks.most_on_a_node(), nodes=count)
    finally:
        ranks.end()


def _training(checkup: Checkup) -> Found:
    config, places = checkup.config, checkup.probes.places
    with _written_to(config.storage, config.limit_s) as folder:
        trial = training.trial_of(checkup.trial, folder, places, checkup.labels, config.training_limit_s)
        try:
            found = within(config.training_limit_s, lambda: training.train(trial))
        except Exception as error:  # whatever ends it, no run will fare better
            text = describe(error).splitlines()[0]
            yield "", failed(f"the trial training ended: {text}", "see docs/faults.md; mend what failed above first")
            return
        assert trial.bundle is not None
        picture = checkup.probes.ask_one(places[-1], training.draw, trial.bundle)
        if isinstance(picture, Silence):
            yield "", failed(f"{found}, but no picture: {picture.reason}", "see the logs of that node")
            return
        yield "", ok(f"{found}; {places[-1].name} drew a picture of {picture[0]} pixels with it")


CHECKS: Mapping[CheckName, Callable[[Checkup], Found]] = {
    "nodes": _nodes,
    "versions": _versions,
    "clock": _clock,
    "ports": _ports,
    "shared_memory": _shared_memory,
    "spill": _spill,
    "scratch": _scratch,
    "open_files": _open_files,
    "gpus": _gpus,
    "storage": _storage,
    "room": _room,
    "all_reduce": _all_reduce,
    "training": _training,
}


def _judged(answers: Iterable[tuple[Place, T | Silence]], judge: Callable[[Place, T], Finding]) -> Found:
    """A finding for each node; silence is a failure, whatever was asked."""
    for place, answer in answers:
        if isinstance(answer, Silence):
            yield from _silent([(place, answer)])
        else:
            yield place.name, judge(place, answer)


def _silent(answers: Iterable[tuple[Place, object]]) -> Found:
    for place, answer in answers:
        if isinstance(answer, Silence):
            yield place.name, failed(answer.reason, "see the logs of that node; where it stays silent, replace it")


@contextmanager
def _written_to(uri: str, limit_s: float) -> Iterator[str]:
    """A new folder on the storage, with a name that readers of records pass over; it is deleted at the end."""
    folder = storage.join(uri, f".unclip-{uuid.uuid4().hex}")
    try:
        yield folder
    finally:
        try:
            within(limit_s, lambda: storage.remove(folder))
        except OSError as error:  # whether nodes can delete is a step of the check itself
            _log.warning(f"{folder} is left behind: {error}")
