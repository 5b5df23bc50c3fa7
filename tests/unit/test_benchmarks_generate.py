"""What the generation benchmark computes from the times of its pictures. No time is judged here."""

from __future__ import annotations

import pytest
from benchmarks.generate import prompts_of, steady, whole


def test_rates_follow_from_times() -> None:
    """Pictures come at 4 a second after 5 s in which the engine fills, and the last one 10 s late."""
    done = [(100.0, 0), *((105.0 + count / 4, count) for count in range(1, 100)), (140.0, 100)]
    assert steady(done) == pytest.approx(4.0)
    assert whole(done) == pytest.approx(100 / 40)


def test_no_prompt_comes_twice() -> None:
    assert len(set(prompts_of(500))) == 500
