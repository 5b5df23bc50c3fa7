"""The processes that make a bulk job's pictures: units in, made pictures on storage, and word of it to the driver.

Ray Data hands units to `Maker`s and starts again what dies. What it does not tell comes from the makers themselves, by a
`Tally` beside the driver: how far they are inside of units that take minutes, what failed, and which unit was in whose hands
when a process died. A unit whose process dies is made again by another; from its second death on it is made alone, so that
the one that kills is known from those that were beside it, and at its fifth the job ends with its number.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unclip.cluster.failures import describe
from unclip.config.base import ConfigError
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.maker import PictureMaker
from unclip.generation.bulk.prompts import Unit
from unclip.utils import storage

DRIVER_FILE = "_driver.json"
"""Names the driver, in the folder of the pictures, while it is at work."""
UNITS_AT_ONCE = 2
"""Units that a maker has in hand: while the last pictures of one are drawn, those of the other keep the engine full."""
MOST_DEATHS = 5
"""Deaths of processes that loaded the bundle, or that had the same unit in hand, after which the job ends."""
DEATHS_BEFORE_ALONE = 2
_BEAT_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """How far a maker's process is, counted from its start."""

    process: str
    """Its own name; a maker that is started again is another process."""
    seconds: float
    """That it has had what it claims."""
    drawn: int
    """Pictures."""
    committed: int
    """Pictures of units that are done."""
    expected: int
    """Pictures that these units were expected to be."""
    is_busy: bool
    """Whether it loads, or has a unit in hand."""


@dataclass(frozen=True)
class Report:
    """What the driver learns at a time."""

    signs: Mapping[str, Sign]
    """The newest of each process that has lived."""
    living: frozenset[str]
    """Processes that were heard of in the last seconds."""
    silent_s: float
    """Since a busy process was last heard of, or since the tally began."""
    failure: str | None
    """Why the job cannot go on, in words."""


class Tally:
    """What the makers of a job tell; an actor beside the driver. Lost and begun anew, it forgets all; the receipts know more."""

    def __init__(self) -> None:
        self._signs: dict[str, Sign] = {}
        self._heard: dict[str, float] = {}
        self._loading: dict[str, str] = {}
        self._in_hand: dict[int, tuple[str, str]] = {}
        self._deaths: Counter[int | str] = Counter()
        self._busy_at = time.monotonic()
        self._failure: str | None = None
        self._is_over = False

    def join(self, actor: str, node: str) -> None:
        """A process of the actor begins to load, on `node`."""
        self._note_death(actor, self._loading.get(actor))
        self._loading[actor] = node
        if self._deaths[actor] >= MOST_DEATHS:
            self.fail(f"{MOST_DEATHS} processes have died while they loaded the bundle, the last one on node {node}")

    def loaded(self, actor: str) -> None:
        """The actor is ready for units."""
        self._loading.pop(actor, None)
        self._deaths.pop(actor, None)

    def deaths(self, unit: int, process: str) -> int:
        """How many processes have died with the unit in hand; asked by the one that will take it in hand."""
        holder, node = self._in_hand.pop(unit, (process, None))
        if holder != process:  # else Ray has sent it once more, since an answer was lost
            self._note_death(unit, node)
        return self._deaths[unit]

    def take(self, unit: int, process: str, node: str) -> None:
        """The unit is in the hands of a process on `node`."""
        self._in_hand[unit] = process, node

    def put_down(self, unit: int, sign: Sign) -> None:
        """The unit is done."""
        self._in_hand.pop(unit, None)
        self.beat(sign)

    def beat(self, sign: Sign) -> bool:
        """A sign of life; whether the job goes on."""
        self._signs[sign.process] = sign
        self._heard[sign.process] = now = time.monotonic()
        if sign.is_busy:
            self._busy_at = now
        return not self._is_over

    def fail(self, why: str) -> None:
        """The job cannot go on; the first reason is the one that is told."""
        self._failure = self._failure or why

    def end(self) -> None:
        """Has every maker stop."""
        self._is_over = True

    def report(self) -> Report:
        """As of now."""
        now = time.monotonic()
        living = frozenset(process for process, heard in self._heard.items() if now - heard < 10 * _BEAT_S)
        return Report(dict(self._signs), living, now - self._busy_at, self._failure)

    def _note_death(self, whose: int | str, node: str | None) -> None:
        """A process on `node` died. Where the node went with it, that says nothing of what the process had in hand."""
        if node is not None and node in living_nodes():
            self._deaths[whose] += 1


def living_nodes() -> set[str]:
    """Ids of the cluster's nodes."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def start_tally() -> Any:
    """A `Tally` on this node, as the handle of an actor."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(Tally).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return remote.remote()


@dataclass
class _Places:
    """Units that may be made at once; one that has to be alone takes all the places."""

    free: int = UNITS_AT_ONCE
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()


class Maker:
    """A `PictureMaker` as Ray Data's actors want it. What goes wrong is told to the tally, and the driver ends the job.

    Args:
        per_node: makers that share a node's cores.
    """

    most_step_s = 1800.0
    """Longest step of the engine, its compilation included; a process whose device hangs ends itself, and is replaced."""

    def __init__(self, config: GenerateConfig, tally: Any, per_node: int) -> None:
        self._tally = tally
        context = ray.get_runtime_context()
        self._actor, self._node = context.get_actor_id(), context.get_node_id()
        self._process, self._started = uuid.uuid4().hex, time.monotonic()
        self._places, self._lock = _Places(), threading.Lock()
        self._drawn = self._committed = self._expected = self._in_hand = 0
        self._candidates = config.candidates
        self._is_over = False
        self._maker: PictureMaker | None = None
        ray.get(tally.join.remote(self._actor, self._node))
        with self._busy("the bundle"):
            threading.Thread(target=self._keep_beating, name="beat", daemon=True).start()
            self._maker = self._load(config, per_node)
            ray.get(tally.loaded.remote(self._actor))

    def __call__(self, row: pa.Table) -> pa.Table:
        """Makes the one unit of the row; answers with its number."""
        unit = Unit(**row.to_pylist()[0])
        deaths = ray.get(self._tally.deaths.remote(unit.index, self._process))
        if deaths >= MOST_DEATHS:
            self._fail(f"{_name(unit)}: {deaths} processes have died with it in hand, one after the other")
        elif self._maker is not None:
            with self._places.take(UNITS_AT_ONCE if deaths >= DEATHS_BEFORE_ALONE else 1), self._busy(_name(unit)):
                self._make(self._maker, unit)
        return row.select(["index"])

    def _load(self, config: GenerateConfig, per_node: int) -> PictureMaker:
        if not storage.exists(storage.join(config.out, DRIVER_FILE)):
            raise ConfigError(
                f"out = {config.out!r} is not the driver's folder here: use s3:// or a disk that nodes share"
            )
        # Ray gives a process as many threads as it reserves CPUs, which may be a fraction of a core.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // per_node))
        maker = PictureMaker(config)
        maker.setup()
        return maker

    def _make(self, maker: PictureMaker, unit: Unit) -> None:
        if not self._is_over:
            ray.get(self._tally.take.remote(unit.index, self._process, self._node))
            receipt = maker.process(unit, self._count)
            with self._lock:
                self._committed += receipt.candidates
                self._expected += receipt.rows * self._candidates
            ray.get(self._tally.put_down.remote(unit.index, self._sign()))

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        """Something is in hand; what is raised fails the job."""
        with self._lock:
            self._in_hand += 1
        try:
            yield
        except Exception as error:
            if not self._is_over:
                self._fail(f"{what}, on node {self._node}: {describe(error)}")
        with self._lock:
            self._in_hand -= 1

    def _count(self) -> None:
        with self._lock:
            self._drawn += 1

    def _fail(self, why: str) -> None:
        ray.get(self._tally.fail.remote(why))

    def _keep_beating(self) -> None:
        while not self._is_over:
            if self._maker is not None and self._maker.step_seconds > self.most_step_s:
                _log.error(f"node {self._node}: a step has taken {self.most_step_s:.0f} s: the device hangs")
                os._exit(1)
            self._is_over = not ray.get(self._tally.beat.remote(self._sign()))
            time.sleep(_BEAT_S)
        if self._maker is not None:
            self._maker.close()

    def _sign(self) -> Sign:
        seconds = time.monotonic() - self._started
        with self._lock:
            return Sign(self._process, seconds, self._drawn, self._committed, self._expected, self._in_hand > 0)


def _name(unit: Unit) -> str:
    """How errors call a unit: its number and its rows."""
    where = f" of {unit.uri!r}" if unit.uri is not None else ""
    return f"unit {unit.index} (rows {unit.start} to {unit.start + unit.rows - 1}{where})"
