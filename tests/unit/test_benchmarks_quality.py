"""The distance that samplers are ranked by, against its definition."""

from __future__ import annotations

import torch
from benchmarks.quality import interval, kid, resamples
from torch.nn import functional

from unclip.utils.random import SampleGenerator


def unit(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    drawn = SampleGenerator.for_samples(seed, torch.arange(count)).normal((6,)).double()
    drawn[:, 0] += shift
    return functional.normalize(drawn, dim=1)


def by_definition(ours: torch.Tensor, real: torch.Tensor, rows: list[int]) -> float:
    """The mean kernel over all pairs of different captions among `rows`, which may name one more than once."""
    pairs = [(i, j) for i in rows for j in rows if i != j]
    means = [sum(float((1 + a[i] @ b[j]) ** 3) for i, j in pairs) / len(pairs) for a, b in ((ours, ours), (real, real))]
    across = sum(float((1 + ours[i] @ real[j]) ** 3) for i, j in pairs) / len(pairs)
    return means[0] + means[1] - 2 * across


def test_the_distance_is_that_of_the_pairs_of_different_captions() -> None:
    ours, real = unit(1, 5), unit(2, 5)
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [2, 0, 1, 1, 1], [0, 3, 0, 0, 2]]).double()
    rows = [[0, 1, 2, 3, 4], [0, 0, 2, 3, 4], [1, 1, 1, 4, 4]]
    expected = torch.tensor([by_definition(ours, real, chosen) for chosen in rows]).double()
    torch.testing.assert_close(kid(ours, real, weights), expected)


def test_the_distance_has_no_bias_and_sees_a_shift() -> None:
    """Of one distribution it is around 0 however few the samples; pairs of one caption, here equal, do not count."""
    ones = torch.ones(1, 8).double()
    found = [float(kid(unit(2 * trial, 8), unit(2 * trial + 1, 8), ones)) for trial in range(400)]
    deviation = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(sum(found) / len(found)) < 4 * deviation
    assert float(kid(unit(1, 200), unit(2, 200, shift=1.0), torch.ones(1, 200).double())) > 0.1


def test_intervals_are_those_of_means_of_captions_drawn_anew() -> None:
    values = torch.arange(100).double()
    weights = resamples(100)
    assert torch.equal(weights.sum(dim=1), torch.full((len(weights),), 100.0).double())
    found = interval(weights @ values / 100)
    deviation = float(values.std(correction=0)) / 10
    assert found["value"] == 49.5
    assert abs(found["low"] - (49.5 - 1.96 * deviation)) < 0.5
    assert abs(found["high"] - (49.5 + 1.96 * deviation)) < 0.5
