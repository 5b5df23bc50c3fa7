"""A stage at work in an engine: its pool, its slots, and who waits for one."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from unclip.generation.engine.job import Job, Row
from unclip.generation.engine.metrics import StageCount, StageMetrics
from unclip.generation.engine.pools import Pool
from unclip.pipelines.stages import StageName


class Lane:
    """A stage at work; rows wait in the order in which they came."""

    def __init__(self, name: StageName, pool: Pool[Any], slots: int) -> None:
        self.name, self.pool, self.slots = name, pool, slots
        self.waiting: deque[Row] = deque()
        self.count = StageCount()

    @property
    def has_work(self) -> bool:
        return bool(self.pool.rows or self.waiting)

    def queue(self, rows: Collection[Row]) -> None:
        """Lets rows wait for a slot."""
        self.waiting.extend(rows)
        for row in rows:
            row.job.waiting += 1

    def next_rows(self) -> list[Row]:
        """Takes as many rows out of those that wait as there are free slots."""
        free = self.slots - len(self.pool.rows)
        rows = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        for row in rows:
            row.job.waiting -= 1
        return rows

    def admitted(self, rows: Collection[Row], now: float) -> None:
        """Counts rows that got a slot."""
        self.count.admitted += len(rows)
        self.count.wait_seconds += sum(now - row.waiting_since for row in rows)

    def stepped(self, rows: int, seconds: float) -> None:
        """Counts a step."""
        self.count.steps += 1
        self.count.rows += rows
        self.count.step_seconds += seconds

    def drop(self, jobs: Collection[Job]) -> None:
        """Lets go of all rows of `jobs`."""
        self.pool.drop([row for row in self.pool.rows if row.job in jobs])
        if any(row.job in jobs for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if row.job not in jobs)

    def metrics(self, arrived_steps: int) -> StageMetrics:
        """As of now; `arrived_steps` are those of requests that are about to wait here."""
        count, (forward_rows, padding_rows) = self.count, self.pool.work
        return StageMetrics(
            slots=self.slots,
            running=len(self.pool.rows),
            waiting=len(self.waiting),
            steps=count.steps,
            rows=count.rows,
            forward_rows=forward_rows,
            padding_rows=padding_rows,
            admitted=count.admitted,
            step_seconds=count.step_seconds,
            wait_seconds=count.wait_seconds,
            queued_steps=arrived_steps + sum(row.steps_left for row in (*self.pool.rows, *self.waiting)),
        )
