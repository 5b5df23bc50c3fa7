"""When worker 0 has the training state saved, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unclip.training.clock import Clock
    from unclip.training.config import TrainConfig
    from unclip.training.saver import SaveOutcome

RETRY_S = 60.0
"""Until a failed save is tried again, at most."""


class SaveSchedule:
    """Saves are due by time, where one is kept or validated, and soon after one that failed.

    Attributes:
        committed_step: of the newest checkpoint; None before the first.
        error: why the newest save failed; None where it did not.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._every_s = config.loop.checkpoint_every_s
        self._steps = [n for n in (config.validation.every_steps, config.loop.keep_every_steps) if n is not None]
        self._last_seconds = 0.0
        self._retry_at: float | None = None
        self.committed_step: int | None = None
        self.error: str | None = None

    @property
    def retry_s(self) -> float:
        """Until a failed save is tried again."""
        return min(self._every_s, RETRY_S)

    def resumed(self, clock: Clock) -> None:
        """The run goes on from the checkpoint at `clock`."""
        self._last_seconds, self.committed_step = clock.seconds, clock.step

    def is_due(self, clock: Clock) -> bool:
        """Whether to save after the step that `clock` has just counted."""
        if any(clock.step % steps == 0 for steps in self._steps):
            return True
        if self._retry_at is not None and clock.seconds >= self._retry_at:
            return True
        return clock.seconds - self._last_seconds >= self._every_s

    def started(self, clock: Clock) -> None:
        """A save of the state at `clock` is under way."""
        self._last_seconds, self._retry_at = clock.seconds, None

    def ended(self, outcome: SaveOutcome, clock: Clock) -> None:
        """Takes in what became of a save."""
        self.error = outcome.error
        if outcome.error is None:
            self.committed_step, self._retry_at = outcome.step, None
        else:
            self._retry_at = clock.seconds + self.retry_s
