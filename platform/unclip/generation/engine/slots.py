"""How many rows each stage may have at once: measured, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unclip.generation.engine.request import EngineError
from unclip.pipelines.stages import StageName

_MEGABYTE = 2**20


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a stage with n rows: `fixed` + n * `row` at the fullest moment, of which n * `kept` stay between steps."""

    fixed: float
    row: float
    kept: float

    @classmethod
    def measured(cls, one: tuple[int, int], two: tuple[int, int]) -> StageMemory:
        """The straight line through the (peak, left) bytes of steps with one and with two rows, which have just joined.

        What is kept counts twice: when rows come or go, the batch before and the one after are there together, and a pass
        that leaves out some unconditional rows has a copy of the others.
        """
        row, kept = max(two[0] - one[0], 0), max(two[1] - one[1], 0)
        return cls(fixed=one[0] - row, row=row + kept, kept=kept)

    def step(self, rows: int) -> float:
        """The fullest moment with `rows` rows."""
        return self.fixed + rows * self.row

    def rows(self, room: float) -> int:
        """The most rows whose step fits into `room` bytes."""
        return int((room - self.fixed) // self.row) if self.row > 0 else int(room >= self.fixed) * 2**31


def total_bytes(memory: Mapping[StageName, StageMemory], slots: Mapping[StageName, int]) -> float:
    """What stages with so many rows take together: one of them steps, the others keep what stays between steps."""
    kept = {name: slots[name] * stage.kept for name, stage in memory.items()}
    return max(memory[name].step(slots[name]) - kept[name] for name in memory) + sum(kept.values())


def divide(
    memory: Mapping[StageName, StageMemory], limits: Mapping[StageName, int], budget: float
) -> dict[StageName, int]:
    """Rows of each stage, at most `limits`, that fit into `budget` bytes together.

    Every stage gets the same number of bytes for its step, the most with which all of them fit. Raises `EngineError` with
    the figures where one row of each does not.
    """

    def slots(room: float) -> dict[StageName, int]:
        return {name: max(1, min(limits[name], stage.rows(room))) for name, stage in memory.items()}

    least = dict.fromkeys(memory, 1)
    if total_bytes(memory, least) > budget:
        figures = ", ".join(f"{name} {stage.step(1) / _MEGABYTE:.0f}" for name, stage in memory.items())
        raise EngineError(
            f"a single picture takes {total_bytes(memory, least) / _MEGABYTE:.0f} MiB (a step of {figures}), "
            f"but the engine may take {budget / _MEGABYTE:.0f} MiB"
        )
    low, high = 0.0, float(budget)
    for _ in range(64):
        room = (low + high) / 2
        low, high = (room, high) if total_bytes(memory, slots(room)) <= budget else (low, room)
    return slots(low)
