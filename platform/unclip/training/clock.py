"""What a run has done, how far that is, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unclip.training.config import LoopConfig


@dataclass
class Clock:
    """The part of a run's state that is not tensors; checkpoints hold it as it is."""

    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    """Time in the loop, over all restarts."""
    skipped_steps: int = 0
    """Steps so far that had no finite gradient and changed nothing."""
    skipped_in_a_row: int = 0
    """Those of them after which no other step came."""

    def finished(self, loop: LoopConfig) -> bool:
        """Whether the run has had its steps or its time."""
        return self.step >= loop.max_steps or (loop.time_limit_s is not None and self.seconds >= loop.time_limit_s)

    def expected_steps(self, loop: LoopConfig) -> int:
        """Steps the run will have; an estimate from the pace so far where time ends it."""
        if loop.time_limit_s is None or self.step < 3:
            return loop.max_steps
        return max(1, min(loop.max_steps, round(self.step * loop.time_limit_s / max(self.seconds, 1e-9))))

    def progress(self, loop: LoopConfig) -> float:
        """Share of the run that is done, 0 to 1."""
        by_time = self.seconds / loop.time_limit_s if loop.time_limit_s else 0.0
        return min(1.0, max(self.step / loop.max_steps, by_time))

    def eta_s(self, loop: LoopConfig) -> float:
        """Seconds that the rest takes at the pace so far."""
        progress = self.progress(loop)
        return self.seconds * (1.0 - progress) / max(progress, 1e-9)
