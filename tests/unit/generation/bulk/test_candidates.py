"""The best of several pictures, by sorting all of them."""

from __future__ import annotations

import random

import pytest

from unclip.generation.bulk.candidates import Candidates
from unclip.generation.bulk.feeding import ahead
from unclip.generation.bulk.rows import Asked
from unclip.pipelines.cascade import GenerationOptions


def row(n: int, count: int) -> Candidates:
    asked = Asked(0, None, "a", n, range(100, 100 + count), GenerationOptions(), "{}", "{}")
    return Candidates(asked, range(count))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lag", [1, 5, 100])
def test_the_best_are_kept_in_the_order_of_their_numbers(seed: int, lag: int) -> None:
    """However much later than its score a picture comes; of equal ones the first."""
    chance = random.Random(seed)
    count = chance.randint(1, 40)
    n = chance.randint(1, count)
    scores = [chance.choice([0.1, 0.2, chance.random()]) for _ in range(count)]
    candidates = row(n, count)
    wanted = ((number, candidates.wants(number, scores[number])) for number in range(count))
    for number, is_wanted in ahead(wanted, lag):
        assert not candidates.is_complete
        candidates.take(
            number, scores[number], {16: f"picture {number}".encode(), 32: b"x" * number} if is_wanted else None
        )
    assert candidates.is_complete
    best = sorted(sorted(range(count), key=lambda number: (-scores[number], number))[:n])
    kept = list(candidates.kept())
    assert [(k.number, k.seed, k.images[16], len(k.images[32])) for k in kept] == [
        (number, 100 + number, f"picture {number}".encode(), number) for number in best
    ]
    assert n == count or [k.clip_score for k in kept] == [scores[number] for number in best]


def test_what_goes_ahead_is_bounded_and_in_order() -> None:
    begun: list[int] = []

    def items():
        for number in range(50):
            begun.append(number)
            yield number

    for expected, number in enumerate(ahead(items(), 7)):
        assert number == expected
        assert len(begun) <= number + 7
    assert len(begun) == 50
