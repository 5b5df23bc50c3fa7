"""What an engine says of itself: plain numbers, running totals since it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from unclip.generation.engine.request import End
from unclip.pipelines.stages import StageName


@dataclass(frozen=True)
class StageMetrics:
    """Of one stage."""

    slots: int
    """Rows that it may have at once."""
    running: int
    """Rows that it has now."""
    waiting: int
    """Rows that wait for a slot now."""
    steps: int
    """Denoising steps so far."""
    rows: int
    """Rows of all these steps."""
    forward_rows: int
    """Rows that the network computed for them, unconditional ones among them, padding not."""
    padding_rows: int
    """Rows that it computed for nothing."""
    admitted: int
    """Rows that got a slot."""
    step_seconds: float
    """Spent in these steps."""
    wait_seconds: float
    """That the admitted rows waited for their slot, added up."""
    queued_steps: int
    """Row steps that rows which wait or run, here, still have to take here."""

    @property
    def occupancy(self) -> float:
        """Rows of the average step as a share of the slots."""
        return self.rows / (self.steps * self.slots) if self.steps else 0.0

    @property
    def steps_per_second(self) -> float:
        """While the stage was at work."""
        return self.steps / self.step_seconds if self.step_seconds else 0.0

    @property
    def rows_per_second(self) -> float:
        """Row steps, while the stage was at work."""
        return self.rows / self.step_seconds if self.step_seconds else 0.0

    @property
    def padding_waste(self) -> float:
        """Share of the network's rows that were padding."""
        computed = self.forward_rows + self.padding_rows
        return self.padding_rows / computed if computed else 0.0


@dataclass(frozen=True)
class EngineMetrics:
    """Of the whole engine; every request that was submitted is under way, or counted in one of the four ends."""

    stages: Mapping[StageName, StageMetrics]
    waiting: int
    """Requests of which a sample waits for a slot, in whichever stage."""
    running: int
    """The others that are under way."""
    submitted: int
    finished: int
    failed: int
    cancelled: int
    expired: int
    queue_seconds: float
    """That requests waited for their first step, added up."""

    @property
    def queued_steps(self) -> int:
        """Row steps that waiting and running rows still have to take in the stage that they are in."""
        return sum(stage.queued_steps for stage in self.stages.values())


@dataclass
class StageCount:
    """The running totals of a stage."""

    steps: int = 0
    rows: int = 0
    admitted: int = 0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass
class EngineCount:
    """The running totals of requests."""

    submitted: int = 0
    ends: Counter[End] = field(default_factory=Counter)
    queue_seconds: float = 0.0
