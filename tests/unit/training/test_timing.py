from __future__ import annotations

import pytest

from unclip.training.timing import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_and_the_rest_add_up_over_windows_and_in_total() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 1
    with timer.phase("data"):
        clock.now += 2
    with timer.phase("forward"):
        clock.now += 5
    first = timer.window()
    with timer.phase("data"):
        clock.now += 3
    clock.now += 1
    second, total = timer.window(), timer.total()

    nothing = dict.fromkeys(("backward", "optimizer", "checkpoint", "log"), 0.0)
    assert first.wall == 8
    assert first.seconds == {"data": 2, "forward": 5, "other": 1} | nothing
    assert first.shares["data"] == 0.25
    assert sum(first.shares.values()) == 1
    assert second.wall == 4
    assert second.seconds == {"data": 3, "forward": 0, "other": 1} | nothing
    assert total.wall == 12
    assert total.seconds == {"data": 5, "forward": 5, "other": 2} | nothing


def test_a_phase_that_fails_still_counts_and_ends() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail() -> None:
        with timer.phase("log"):
            clock.now += 1
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    with timer.phase("log"):
        clock.now += 1
    assert timer.total().seconds["log"] == 2


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer(Clock())
    with (
        timer.phase("data"),
        pytest.raises(RuntimeError, match="'forward' inside phase 'data'"),
        timer.phase("forward"),
    ):
        pass


def test_no_time_has_no_shares() -> None:
    assert set(PhaseTimer(Clock()).total().shares.values()) == {0.0}
