"""How many pictures are taken on at once, and when those who were refused should come again."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip.serving.errors import InvalidRequest, Overloaded
from unclip.serving.guards.admission import Admission


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def finish(admission: Admission, clock: Clock, *, pictures: int, seconds: float) -> None:
    """So many, one after the other, each of which takes so long."""
    for _ in range(pictures):
        with admission.take(1):
            clock.now += seconds


@given(
    limit=st.integers(1, 12),
    moves=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["come", "end", "fail"])), max_size=60),
)
def test_there_are_never_more_than_the_limit_and_none_at_the_end(limit: int, moves) -> None:
    admission = Admission(limit)
    under_way: list[tuple[int, ExitStack]] = []
    for count, move in moves:
        if move == "come":
            block = ExitStack()
            room = limit - sum(taken for taken, _ in under_way)
            if count > room:
                with pytest.raises(InvalidRequest if count > limit else Overloaded):
                    block.enter_context(admission.take(count))
            else:
                block.enter_context(admission.take(count))
                under_way.append((count, block))
        elif under_way:
            _, block = under_way.pop(count % len(under_way))
            error = None if move == "end" else RuntimeError("a stage failed")
            block.__exit__(type(error) if error else None, error, None)
        assert admission.in_flight == sum(taken for taken, _ in under_way) <= limit
    for _, block in under_way:
        block.close()
    assert admission.in_flight == 0


def test_who_is_refused_is_told_when_room_is_due() -> None:
    clock = Clock()
    admission = Admission(4, clock=clock)
    finish(admission, clock, pictures=10, seconds=3.0)
    with admission.take(4):
        with pytest.raises(Overloaded) as one:
            admission.take(1).__enter__()
        with pytest.raises(Overloaded) as three:
            admission.take(3).__enter__()
    assert (one.value.retry_after, three.value.retry_after) == (3, 9)


def test_the_rate_is_that_of_the_last_pictures_while_any_were_under_way() -> None:
    clock = Clock()
    admission = Admission(1, clock=clock)
    finish(admission, clock, pictures=100, seconds=5.0)
    assert admission.retry_after() == 5
    clock.now += 3600  # nobody asked
    assert admission.retry_after() == 5
    finish(admission, clock, pictures=64, seconds=2.0)
    assert admission.retry_after() == 2


def test_what_fails_at_once_does_not_look_fast() -> None:
    clock = Clock()
    admission = Admission(1, clock=clock)
    finish(admission, clock, pictures=3, seconds=4.0)
    for _ in range(50):
        with pytest.raises(RuntimeError), admission.take(1):
            raise RuntimeError("no")
    assert admission.retry_after() == 4


def test_it_is_worth_coming_again_within_a_minute() -> None:
    clock = Clock()
    admission = Admission(8, clock=clock)
    assert 1 <= admission.retry_after() <= 60
    finish(admission, clock, pictures=2, seconds=500.0)
    assert admission.retry_after(8) == 60
    finish(admission, clock, pictures=64, seconds=0.001)
    assert admission.retry_after() == 1


def test_more_than_ever_fit_are_refused_for_good() -> None:
    with pytest.raises(InvalidRequest, match="9 pictures: this server draws at most 8 at once"):
        Admission(8).take(9).__enter__()
    with pytest.raises(ValueError, match="count = 0"):
        Admission(8).take(0).__enter__()
    with pytest.raises(ValueError, match="pictures = 0"):
        Admission(0)
