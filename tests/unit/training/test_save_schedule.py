from __future__ import annotations

from typing import Any

from unclip.recipes import RECIPES
from unclip.training.clock import Clock
from unclip.training.save_schedule import SaveSchedule
from unclip.training.saver import SaveOutcome


def schedule(**changes: Any) -> SaveSchedule:
    loop = {"checkpoint_every_s": 600.0} | changes.pop("loop", {})
    return SaveSchedule(RECIPES["prior"]["debug"]().merged(changes | {"loop": loop}))


def failed(step: int) -> SaveOutcome:
    return SaveOutcome(step=step, seconds=1.0, bytes=0, error="disk full")


def committed(step: int) -> SaveOutcome:
    return SaveOutcome(step=step, seconds=1.0, bytes=9, error=None)


def test_time_makes_a_save_due_counted_from_the_last_one() -> None:
    saves = schedule(loop={"checkpoint_every_s": 10.0})
    assert [saves.is_due(Clock(step=1, seconds=t)) for t in (0.0, 9.9, 10.0, 11.0)] == [False, False, True, True]
    saves.started(Clock(step=1, seconds=11.0))
    assert [saves.is_due(Clock(step=2, seconds=t)) for t in (20.9, 21.0)] == [False, True]
    assert schedule(loop={"checkpoint_every_s": 0.0}).is_due(Clock(step=1))


def test_a_resumed_run_counts_from_its_checkpoint() -> None:
    saves = schedule()
    saves.resumed(Clock(step=7, seconds=5000.0))
    assert saves.committed_step == 7
    assert [saves.is_due(Clock(step=8, seconds=t)) for t in (5599.0, 5600.0)] == [False, True]


def test_steps_that_are_validated_or_kept_are_saved() -> None:
    saves = schedule(loop={"keep_every_steps": 6}, validation={"every_steps": 4})
    assert [step for step in range(1, 14) if saves.is_due(Clock(step=step))] == [4, 6, 8, 12]


def test_a_failed_save_is_told_and_tried_again_soon() -> None:
    saves = schedule()
    saves.started(Clock(step=5, seconds=600.0))
    saves.ended(failed(5), Clock(step=6, seconds=603.0))
    assert (saves.error, saves.committed_step) == ("disk full", None)
    assert [saves.is_due(Clock(step=7, seconds=t)) for t in (662.0, 663.0)] == [False, True]
    saves.started(Clock(step=8, seconds=663.0))
    assert not saves.is_due(Clock(step=9, seconds=900.0))  # one try at a time
    saves.ended(committed(8), Clock(step=9, seconds=900.0))
    assert (saves.error, saves.committed_step) == (None, 8)
    assert not saves.is_due(Clock(step=10, seconds=901.0))


def test_frequent_saves_are_tried_again_at_their_pace() -> None:
    saves = schedule(loop={"checkpoint_every_s": 3.0})
    saves.started(Clock(step=5, seconds=10.0))
    saves.ended(failed(5), Clock(step=6, seconds=11.0))
    assert [saves.is_due(Clock(step=7, seconds=t)) for t in (12.9, 13.0)] == [False, True]
