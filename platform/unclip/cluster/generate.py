"""Pictures of one prompt or of millions: Ray Data hands units of prompts to makers on all the GPUs of a cluster.

What counts is on storage: a unit is done when its receipt is there, and the driver goes by that alone. So makers may die,
nodes may go, and a driver that was killed is replaced by the same command. Where nodes went that nothing has replaced, Ray
would wait for them without end with the units that were there; then a further round begins on the nodes that are left.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from unclip.cluster import autoscaler, preflight, room, session, stream
from unclip.cluster.cost import Account, Hours, gpu_kind
from unclip.cluster.failures import RunFailed, describe
from unclip.cluster.lease import Lease
from unclip.cluster.makers import DRIVER_FILE, UNITS_AT_ONCE, Maker, Report, Sign, living_nodes, start_tally
from unclip.cluster.preflight import Demand, Node, PreflightError
from unclip.cluster.prometheus import JobProgress
from unclip.data.manifest import DataError
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.folder import MANIFEST
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.prompts import Unit
from unclip.utils import storage
from unclip.utils.progress import progress_bar

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

STRANDED_S = 30.0
"""Silence after which a round ends that has lost a node: nobody is left who could make what is missing."""
ROOM_S = 1800.0
"""Longest wait for a node that holds a maker, when all such nodes are lost, and for an actor that is at work."""
COST_FILE = "_cost.json"
"""Hours that all submissions have claimed, in the folder of the pictures."""
_LOOK_S = 1.0
_RATE_S = 60.0
_MOST_LOST_STARTS = 10
_log = logging.getLogger(__name__)


class _Stranded(RuntimeError):
    """Units are in the hands of processes whose nodes are gone."""


def run_generate(config: GenerateConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Makes what is missing and returns the manifest; a dry run checks everything and says what would be made.

    Raises `ConfigError`, `BundleError`, `DataError`, `PreflightError` or `OSError` before anything is claimed, and
    `RunFailed` where the job ended before it was finished: the same command goes on with it.
    """
    session.refuse_lost_paths({"bundle": config.bundle, "prompts": config.prompts, "out": config.out})
    job = BulkJob.prepare(config)
    if dry_run:
        return {"prompts": job.prompts.rows, "units": len(job.prompts.units), "actors": _count_makers(job)}
    with Lease(storage.join(job.config.out, DRIVER_FILE), f"out = {job.config.out!r}") as lease:
        units = job.begin()
        if not units and storage.exists(storage.join(job.config.out, MANIFEST)):
            return dict(storage.read_json(storage.join(job.config.out, MANIFEST)))
        try:
            submission = _make(job, units, lease) if units else {}
            return job.finish(submission)
        except (DataError, OSError) as error:
            raise RunFailed(_goes_on(str(error))) from error


def _count_makers(job: BulkJob) -> int:
    """What the cluster would hold, asked where there is one; a local instance is not started for it."""
    if not session.joins_cluster():
        return _fit(job.config, preflight.local_nodes())[1]
    with session.session():
        nodes = _nodes(job.config)
        if autoscaler.grows():
            return job.config.actors or _places_or_one(_maker(job.config, nodes), nodes)
        return _fit(job.config, preflight.cluster_nodes())[1]


def _nodes(config: GenerateConfig) -> list[Node]:
    """The living nodes that the job may use."""
    return [node for node in preflight.cluster_nodes() if node.has(config.node_labels)]


def _maker(config: GenerateConfig, nodes: Sequence[Node]) -> Node:
    """What a maker claims."""
    gpus = config.gpus_per_actor
    if gpus is None:
        wants_gpu = config.device == "auto" and any(node.gpus for node in nodes)
        gpus = 1.0 if wants_gpu or config.device.startswith("cuda") else 0.0
    return Node(config.cpus_per_actor, gpus)


def _fit(config: GenerateConfig, nodes: Sequence[Node]) -> tuple[Node, int]:
    """What a maker claims, and how many there will be, where more nodes do not come."""
    maker = _maker(config, [node for node in nodes if node.has(config.node_labels)])
    return maker, preflight.fit_makers(config.actors, maker, nodes, config.node_labels)


def _fit_cluster(config: GenerateConfig) -> tuple[Node, int]:
    """The same on the connected cluster, whose autoscaler may bring nodes."""
    nodes = _nodes(config)
    if not autoscaler.grows():
        return _fit(config, preflight.cluster_nodes())
    maker = _maker(config, nodes)
    if not maker.gpus and config.gpus_per_actor is None and config.device == "auto":
        with_gpu = Node(maker.cpus, 1.0)
        maker = with_gpu if room.may_come(Demand(1, with_gpu, labels=config.node_labels)) else maker
    return maker, config.actors or _places_or_one(maker, nodes)


def _places_or_one(maker: Node, nodes: Sequence[Node]) -> int:
    return max(1, preflight.places(maker, nodes) if maker.gpus else 1)


def _make(job: BulkJob, units: Sequence[Unit], lease: Lease) -> dict[str, Any]:
    """Rounds until nothing is missing; what this submission took."""
    if not session.joins_cluster():  # this machine will not grow; nothing has to be started to know
        _fit(job.config, preflight.local_nodes())
    with session.session():
        maker, wanted = _fit_cluster(job.config)
        with Progress(job, units, maker) as progress:
            rounds = _Rounds(job, lease, maker, progress)
            while units:
                stranded = rounds.run(units, rounds.wait_for_room(wanted))
                left = job.begin()
                if len(left) == len(units) and not stranded:
                    raise RunFailed(_goes_on(f"{len(left)} units were handed out, and are not there"))
                units = left
        return progress.summary()


class _Rounds:
    """Each is one execution by Ray Data, of as many makers as there is room for."""

    def __init__(self, job: BulkJob, lease: Lease, maker: Node, progress: Progress) -> None:
        self._job, self._lease, self._maker, self._progress = job, lease, maker, progress
        self._has_run = False

    def run(self, units: Sequence[Unit], count: int) -> bool:
        """Makes the units; whether some are left, since nodes are lost that had them. Raises `RunFailed`."""
        self._has_run = True
        tally = start_tally()
        dataset = self._dataset(units, min(count, len(units)), tally)
        try:
            with _watched(_Watch(tally, self._lease, self._progress)):
                for _ in dataset.iter_internal_ref_bundles():
                    pass
            self._progress.show(_report(tally))
        except _Stranded:
            _log.warning(f"a node is lost with what it had in hand: a new round begins on {len(living_nodes())} nodes")
            return True
        except RunFailed:
            raise
        except Exception as error:  # of Ray: our own makers raise nothing
            raise RunFailed(_goes_on(describe(error))) from error
        finally:
            with suppress(Exception):  # of a cluster that is gone
                tally.end.remote()
        return False

    def wait_for_room(self, wanted: int) -> int:
        """How many makers to start: those that the nodes hold that are left, at most those wanted; waits for a first one.

        Where there is an autoscaler it is asked for all, and they are started when no more come for a while: those that
        have no room yet join as nodes do.
        """
        if autoscaler.grows():
            self._ask_for_room(wanted)
            return wanted
        deadline = time.monotonic() + ROOM_S
        while not (there := preflight.places(self._maker, _nodes(self._job.config))):
            if time.monotonic() > deadline:
                raise RunFailed(_goes_on(f"all nodes that hold a maker are lost, and in {ROOM_S:.0f} s none came"))
            self._lease.check()
            time.sleep(_LOOK_S)
        return min(there, wanted)

    def _ask_for_room(self, wanted: int) -> None:
        demand = Demand(wanted, self._maker, labels=self._job.config.node_labels, who="actors")
        counts = sorted({wanted, 1}, reverse=True)
        try:
            room.wait_for_room(counts, demand, placement="PACK", wait_s=ROOM_S, watch=self._lease.check)
        except PreflightError as error:
            if self._has_run:
                raise RunFailed(_goes_on(str(error))) from error
            raise

    def _dataset(self, units: Sequence[Unit], count: int, tally: Any) -> ray.data.Dataset:
        """One row for each unit that is done."""
        config, maker = self._job.config, self._maker
        if config.device == "auto":
            config = config.merged({"device": "cuda" if maker.gpus else "cpu"})
        places = [preflight.places(maker, [node]) for node in _nodes(config)]
        homes = max(sum(there > 0 for there in places), math.ceil(count / max([1, *places])))  # nodes may still come
        context = stream.data_context()
        context.execution_options.preserve_order = False  # a slow unit would hold up the others
        context.execution_no_progress_timeout_s = -1  # a unit may take hours; the makers themselves say that they live
        context.max_consecutive_actor_init_deaths = _MOST_LOST_STARTS  # nodes that go while processes start
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Watched]
        with DataContext.current(context):
            dataset = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units))
            return dataset.map_batches(
                Maker,
                fn_constructor_args=(config, tally, max(1, round(count / homes))),
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=count,
                    max_tasks_in_flight_per_actor=UNITS_AT_ONCE,
                    max_concurrent_calls_per_actor=UNITS_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                num_cpus=maker.cpus,
                label_selector=config.node_labels,
                **({"num_gpus": maker.gpus} if maker.gpus else {}),
            )


class _Watch:
    """Looks after a round, from within Ray Data's own loop; what it raises ends the round."""

    def __init__(self, tally: Any, lease: Lease, progress: Progress) -> None:
        self._tally, self._lease, self._progress = tally, lease, progress
        self._nodes = living_nodes()
        self._looked = 0.0

    def __call__(self) -> None:
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._lease.check()
        report = _report(self._tally)
        self._progress.show(report)
        if report.silent_s > ROOM_S:
            raise RunFailed(_goes_on(f"for {ROOM_S:.0f} s no actor was at work: what they claim is taken"))
        if report.silent_s > STRANDED_S and self._nodes - living_nodes():
            raise _Stranded
        self._looked = time.monotonic()


def _report(tally: Any) -> Report:
    """Raises `RunFailed` where the makers have told why the job cannot go on."""
    report: Report = ray.get(tally.report.remote())
    if report.failure is not None:
        raise RunFailed(_goes_on(report.failure))
    return report


def _goes_on(why: str) -> str:
    return f"{why}; what is done is kept, and the same command goes on from there"


_WATCH: ContextVar[Callable[[], None]] = ContextVar("watch")


@contextmanager
def _watched(watch: Callable[[], None]) -> Iterator[None]:
    """Executions that begin in the block are watched."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


class _Watched(ExecutionCallback):
    """Calls the watch in every round of Ray Data's loop, which runs in a thread of its own."""

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        self._watch = _WATCH.get()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        self._watch()


class Progress:
    """The bar, and what a submission has taken up to now."""

    def __init__(self, job: BulkJob, missing: Sequence[Unit], maker: Node) -> None:
        self._expected = job.prompts.rows * job.config.candidates  # rows may say otherwise, which nobody has read yet
        self._done = self._expected - sum(unit.rows for unit in missing) * job.config.candidates
        self._bar = progress_bar(self._expected, "image", done=self._done, title="generate")
        self._bar.bar_format = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} images [{elapsed}{postfix}]"
        self._maker, self._kind = maker, ""
        self._account = Account(storage.join(job.config.out, COST_FILE), job.config.cost)
        self._gauges = JobProgress("generate", job.config.out, job.config.cost)
        self._signs: dict[str, Sign] = {}
        self._window: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._gauges.close()
        self._account.write()

    def show(self, report: Report) -> None:
        """What the makers have told by now."""
        self._signs |= report.signs
        committed = sum(sign.committed for sign in self._signs.values())
        living = [report.signs[name] for name in report.living]
        under_way = sum(max(0, sign.drawn - sign.committed) for sign in living)
        self._bar.total = self._expected + committed - sum(sign.expected for sign in self._signs.values())
        rate, left = self._rate(), self._bar.total - self._done - committed - under_way
        parts = [f"{rate:.3g} images/s"]
        if rate > 0 and left > 0:
            parts.append(f"{_duration(left / rate)} left")
        parts += [self._hours(), f"{len(report.living)} at work"]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(self._done + committed + under_way - self._bar.n)
        self._account.show(self._claimed())
        self._gauges.show(self._bar.n, self._bar.total)
        self._gauges.cost(self._account.record())

    def summary(self) -> dict[str, Any]:
        """What the manifest says of this submission."""
        seconds, drawn, claimed = time.monotonic() - self._started, self.drawn, self._claimed()
        return {
            "submission": {
                "seconds": round(seconds, 1),
                "candidates": drawn,
                "images_per_s": round(drawn / seconds, 3),
                "gpu_hours": round(claimed.all_gpus, 4),
                "cpu_hours": round(claimed.cpus, 4),
            },
            "cost": self._account.record(),
        }

    @property
    def drawn(self) -> int:
        """Pictures up to now, those of units that were lost among them."""
        return sum(sign.drawn for sign in self._signs.values())

    def _rate(self) -> float:
        """Pictures a second over the last minute."""
        self._window.append((time.monotonic(), self.drawn))
        while self._window[-1][0] - self._window[0][0] > _RATE_S:
            self._window.popleft()
        (began, first), (now, last) = self._window[0], self._window[-1]
        return (last - first) / (now - began) if now > began else 0.0

    def _claimed(self) -> Hours:
        """By the makers of this submission."""
        if self._maker.gpus and not self._kind:
            self._kind = gpu_kind()  # of nodes that may have come only now
        return Hours.of(sum(sign.seconds for sign in self._signs.values()), self._maker, self._kind)

    def _hours(self) -> str:
        claimed = self._claimed()
        return f"{claimed.all_gpus:.3g} GPU-h" if self._maker.gpus else f"{claimed.cpus:.3g} CPU-h"


def _duration(seconds: float) -> str:
    """3 h 05 min, or 4 min 10 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
