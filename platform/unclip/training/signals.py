"""How the world outside asks a run to save and end before it is done."""

from __future__ import annotations

from typing import Protocol


class Signals(Protocol):
    """Asked by worker 0 after every step."""

    def stop_reason(self) -> str | None:
        """Why the run should save and end now ("preemption of node …"); None to go on. Must not block."""
        ...
