"""Step-level continuous batching: requests join a stage's batch before its next step, and leave it after their last one.

`Engine.step` takes one denoising step of one stage. Nothing runs beside it: an engine is as deterministic as its calls.

Stages take turns, so each row of each batch goes one step further in a round of at most as many steps as there are stages.
Rows wait in each stage in the order in which they came. So of a stage with S slots, whose rows take K steps at most, a row
that waits behind p others is admitted after at most ceil((p + 1) / S) * K rounds, whatever else arrives: within K rounds
every slot is free once, and none is ever given to who came later.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch

from unclip.generation.engine.captions import Captions, Told
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.job import Job, Row
from unclip.generation.engine.lane import Lane
from unclip.generation.engine.metrics import EngineCount, EngineMetrics
from unclip.generation.engine.pools import build_pool
from unclip.generation.engine.probe import measured_slots
from unclip.generation.engine.request import DeadlineError, Picture, Request, StageFailedError, Ticket, Update
from unclip.generation.engine.route import Stages, plan_route, stage_after
from unclip.pipelines.pictures import to_uint8
from unclip.pipelines.stages import StageName


class Engine:
    """Makes the pictures of many requests at once, each as it would come out alone (within float tolerance).

    Making one measures the memory of its stages, a step with one row and one with two. Raises `EngineError` with the
    figures where a single picture does not fit.

    Args:
        stages: loaded, on their device.
        clock: seconds; for deadlines and metrics.
    """

    def __init__(
        self, stages: Stages, config: EngineConfig | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not stages.by_name:
            raise ValueError("stages: an engine needs one at least")
        config = EngineConfig() if config is None else config
        self._stages, self._clock = stages, clock
        self._captions = Captions(stages)
        self._lanes: dict[StageName, Lane] = {}
        for name, slots in measured_slots(stages, config).items():
            pool = build_pool(stages.by_name[name], stages, compile_for=slots if config.compile else None)
            self._lanes[name] = Lane(name, pool, slots)
        self._turn = 0
        self._arrived: deque[Job] = deque()  # by threads; all else belongs to the one that steps
        self._jobs: dict[Job, None] = {}
        self._pace = _Pace(stages.device)
        self._count = EngineCount()

    @property
    def slots(self) -> dict[StageName, int]:
        """Rows that each stage may have at once."""
        return {name: lane.slots for name, lane in self._lanes.items()}

    @property
    def has_work(self) -> bool:
        """Whether any request is under way."""
        return bool(self._arrived or self._jobs)

    @property
    def waiting(self) -> int:
        """Requests of which a sample waits for a slot, in whichever stage; from any thread."""
        return len({*self._arrived, *(job for job in list(self._jobs) if job.waiting)})

    def submit(self, request: Request) -> Ticket:
        """Takes a request on; from any thread.

        Raises `ConfigError` or `ValueError` naming what is wrong with it, and `BundleError` where a stage is missing.
        """
        route = plan_route(request, self._stages)
        ticket = Ticket(request)
        self._arrived.append(Job.of(ticket, route, self._stages.device, self._clock()))
        return ticket

    @torch.no_grad()  # inference_mode would leave no way to take the gradients of guides
    def step(self) -> None:
        """One step of the stage whose turn it is; without work nothing.

        What a stage raises ends the requests of its batch, or those that were about to join it, and no others.
        """
        self._welcome()
        now = self._clock()
        for job in self._jobs:
            if now >= job.deadline:
                job.ticket.fail(DeadlineError(f"not done within timeout = {job.request.timeout} seconds"))
        self._part_with([job for job in self._jobs if job.ticket.done()])
        lane = self._next_lane()
        if lane is None:
            return
        self._admit(lane)
        if not lane.pool.rows:
            return
        rows, began = lane.pool.stepping, self._clock()
        try:
            done = lane.pool.step()
            self._pace()
        except Exception as error:
            self._fail({row.job for row in rows}, lane.name, error)
            return
        lane.stepped(len(rows), self._clock() - began)
        for row in rows:
            row.job.steps += 1
        self._show(lane, rows, dict(done))
        for row, output in done:
            self._hand_over(row, output)

    def fail_all(self, error: BaseException) -> None:
        """Ends every request that is under way with `error`."""
        self._welcome()
        self.give_up(error)
        self._part_with(self._jobs)

    def give_up(self, error: BaseException) -> None:
        """Ends the tickets of all requests that are under way with `error`, and touches nothing else: from any thread,
        even where a step never ends."""
        for job in [*self._arrived, *self._jobs]:
            with contextlib.suppress(BaseException):  # whatever one ticket's callbacks raise, the others end too
                job.ticket.fail(error)
            job.ticket.begun.set()

    def metrics(self) -> EngineMetrics:
        """As of now."""
        count, waiting, ends = self._count, self.waiting, self._count.ends
        arrived = Counter[StageName]()
        for job in list(self._arrived):
            first = next(iter(job.route.sampling))
            arrived[first] += job.steps_in(first, self._stages)
        return EngineMetrics(
            stages={name: lane.metrics(arrived[name]) for name, lane in self._lanes.items()},
            waiting=waiting,
            running=len(self._jobs) + len(self._arrived) - waiting,
            submitted=count.submitted + len(self._arrived),
            finished=ends["finished"],
            failed=ends["failed"],
            cancelled=ends["cancelled"],
            expired=ends["expired"],
            queue_seconds=count.queue_seconds,
        )

    # --- who comes, who goes ------------------------------------------------------------------------------------------

    def _welcome(self) -> None:
        """Lets those that arrived wait for their first stage."""
        while self._arrived:
            job = self._arrived[0]  # there until it is elsewhere too: other threads ask whether there is work
            self._count.submitted += 1
            self._jobs[job] = None
            self._queue(job, next(iter(job.route.sampling)))
            self._arrived.popleft()

    def _queue(self, job: Job, name: StageName) -> None:
        self._lanes[name].queue(job.rows(name, self._stages, self._clock()))

    def _part_with(self, jobs: Iterable[Job]) -> None:
        """Counts and forgets jobs whose tickets have ended; their slots are free from then on."""
        gone = self._jobs.keys() & jobs
        for job in gone:
            del self._jobs[job]
            self._count.ends[job.ticket.end] += 1
            job.ticket.begun.set()
        if gone:
            for lane in self._lanes.values():
                lane.drop(gone)

    def _fail(self, jobs: Collection[Job], name: StageName, error: Exception) -> None:
        """Ends jobs whose stage raised."""
        for job in jobs:
            failure = StageFailedError(f"stage {name} failed: {error}")
            failure.__cause__ = error
            job.ticket.fail(failure)
        self._part_with(jobs)

    # --- one stage ----------------------------------------------------------------------------------------------------

    def _next_lane(self) -> Lane | None:
        """The next stage in turn that has work."""
        lanes = list(self._lanes.values())
        for offset in range(len(lanes)):
            index = (self._turn + offset) % len(lanes)
            if lanes[index].has_work:
                self._turn = index + 1
                return lanes[index]
        return None

    def _admit(self, lane: Lane) -> None:
        """Lets those that have waited longest into the free slots; what raises for one ends that one alone."""
        rows = lane.next_rows()
        if not rows:
            return
        try:
            told = self._captions.told([row.job for row in rows]) if lane.pool.reads_captions else [Told()] * len(rows)
        except Exception as error:
            self._fail({row.job for row in rows}, lane.name, error)
            return
        entries = {}
        for row, captions in zip(rows, told, strict=True):
            try:
                entries[row] = lane.pool.enter(row, captions)
            except Exception as error:
                self._fail({row.job}, lane.name, error)
        entries = {row: entry for row, entry in entries.items() if row.job in self._jobs}  # not beside a failed draw
        try:
            lane.pool.admit(list(entries.values()))
        except Exception as error:
            self._fail({row.job for row in entries}, lane.name, error)
            return
        now = self._clock()
        lane.admitted(entries, now)
        for job in {row.job: None for row in entries}:
            if job.began is None:
                job.began = now
                self._count.queue_seconds += now - job.submitted
                job.ticket.begun.set()

    def _show(self, lane: Lane, rows: Collection[Row], done: Mapping[Row, torch.Tensor]) -> None:
        """Tells those who watch."""
        for row in rows:
            watch = row.job.request.watch
            if watch is None or row.job not in self._jobs:
                continue
            try:
                watch(Update(lane.name, row.job.steps, row.job.total, partial(_picture, lane, row, done)))
            except Exception as error:
                row.job.ticket.fail(error)
                self._part_with([row.job])

    def _hand_over(self, row: Row, output: torch.Tensor) -> None:
        """Gives what a stage made of a row to the next stage, or to who asked for it."""
        job = row.job
        if job not in self._jobs:
            return
        try:
            if not bool(output.isfinite().all()):
                raise FloatingPointError("its output is not finite")
            if not job.take(row, output, self._stages):
                return
            following = stage_after(job.route, row.stage)
            result = job.result(self._clock()) if following is None else None
        except Exception as error:
            self._fail({job}, row.stage, error)
            return
        if following is not None:
            self._queue(job, following)
        elif result is not None:
            job.ticket.answer(result)
            self._part_with([job])


class _Pace:
    """Lets the host prepare one step while the device takes another, and no more: who goes, goes within a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None

    def __call__(self) -> None:
        if self._device.type != "cuda":
            return
        if self._before is not None:
            self._before.synchronize()
        self._before = torch.cuda.Event()
        self._before.record(torch.cuda.current_stream(self._device))


def _picture(lane: Lane, row: Row, done: Mapping[Row, torch.Tensor]) -> Picture | None:
    """What a row looks like after the step that has just been taken."""
    clean = lane.pool.clean(row) if row not in done else done[row] if row.makes_picture else None
    return None if clean is None else to_uint8(clean)[0].cpu().numpy()
