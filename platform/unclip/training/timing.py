"""Where a training loop's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["data", "forward", "backward", "optimizer", "checkpoint", "log"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Timing:
    """Seconds of wall-clock time and what they went to: every phase, and `other` for what was inside none."""

    wall: float
    seconds: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Each entry of `seconds` as a share of the wall-clock time: they add up to 1, or are 0 if no time passed."""
        return {name: seconds / self.wall if self.wall else 0.0 for name, seconds in self.seconds.items()}


class PhaseTimer:
    """Adds up the time spent in `phase(...)` blocks, over the whole run and over the window since the last report.

    CUDA work counts where the host waits for it, not where it was launched.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._began = clock()
        self._window_began, self._window_spent = self._began, dict(self._spent)
        self._active: Phase | None = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the block as `name`. Phases do not nest: time would count twice."""
        if self._active is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self._active!r}")
        self._active = name
        began = self._clock()
        try:
            yield
        finally:
            self._spent[name] += self._clock() - began
            self._active = None

    def total(self) -> Timing:
        """Everything since the timer was made."""
        return _timing(self._clock() - self._began, self._spent)

    def window(self) -> Timing:
        """What came since the last call, or since the timer was made; begins a new window."""
        now = self._clock()
        spent = {name: seconds - self._window_spent[name] for name, seconds in self._spent.items()}
        timing = _timing(now - self._window_began, spent)
        self._window_began, self._window_spent = now, dict(self._spent)
        return timing


def _timing(wall: float, spent: dict[str, float]) -> Timing:
    return Timing(wall, {**spent, "other": max(0.0, wall - sum(spent.values()))})
