"""What a run's validations have found: `validation.jsonl` and `samples/` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip.training.run_folder import RunFolder


class ValidationLog:
    """Reads and writes the lines of one run; there must be one writer."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def records(self) -> list[dict[str, Any]]:
        """All lines, oldest first."""
        return self._run.lines(self._run.validation_uri)

    def newest_step(self) -> int:
        """The last step that is settled, validated or missed; 0 where there is none."""
        return max((int(record["step"]) for record in self.records()), default=0)

    def add(self, step: int, *, seconds: float, metrics: Mapping[str, float], samples: str | None) -> None:
        """A validation that took `seconds`; `samples` is the grid's address inside the run folder."""
        record = {"step": step, "seconds": round(seconds, 3), "metrics": dict(metrics), "samples": samples}
        self._run.append(self._run.validation_uri, record)

    def miss(self, step: int, reason: str) -> None:
        """A validation that was due and is not done: a line without metrics."""
        record = {"step": step, "seconds": 0.0, "metrics": {}, "samples": None, "missed": reason}
        self._run.append(self._run.validation_uri, record)
