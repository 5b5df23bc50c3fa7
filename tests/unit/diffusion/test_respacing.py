"""Timestep lists against the definitions and against known lists."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from unclip.diffusion.respacing import explicit_timesteps, sampling_timesteps, step_pairs


def test_known_lists() -> None:
    """The 7 and 25 steps of Karlo as its schedulers have them."""
    assert sampling_timesteps(1000, 7, "linspace") == [999, 832, 666, 500, 333, 166, 0]
    steps = sampling_timesteps(1000, 25, "linspace")
    assert (steps[:4], steps[-2:]) == ([999, 957, 916, 874], [42, 0])
    assert sampling_timesteps(1000, 5, "leading") == [800, 600, 400, 200, 0]
    assert sampling_timesteps(1000, 5, "trailing") == [999, 799, 599, 399, 199]


def test_fast27_is_glides_list() -> None:
    steps = sampling_timesteps(1000, 27, "fast27")
    glide = "0,22,44,66,88,111,133,155,177,199,200,222,244,266,288,311,333,355,377,399,400,500,599,600,799,800,997"
    assert steps[::-1] == [int(step) for step in glide.split(",")]


@pytest.mark.parametrize("total", [1, 2, 10, 27, 250])
def test_every_count_follows_the_definitions(total: int) -> None:
    """Exact fractions, whose rounding is half to even, stand for the formulas."""
    for count in range(1, total + 1):
        linspace = sampling_timesteps(total, count, "linspace")
        trailing = sampling_timesteps(total, count, "trailing")
        if count > 1:
            assert linspace[::-1] == [round(Fraction(i * (total - 1), count - 1)) for i in range(count)]
        assert trailing == [round(total - Fraction(i * total, count)) - 1 for i in range(count)]
        assert linspace[0] == trailing[0] == total - 1
        for steps in (linspace, trailing, sampling_timesteps(total, count, "leading")):
            assert len(steps) == count
            assert all(earlier > later for earlier, later in itertools.pairwise(steps))
            assert total > steps[0] >= steps[-1] >= 0


@pytest.mark.parametrize("count", [0, -1, 11])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "fast27"])
def test_counts_out_of_range_are_refused(count: int, spacing) -> None:
    with pytest.raises(
        ValueError, match=f"num_inference_steps must be between 1 and num_train_timesteps = 10, not {count}"
    ):
        sampling_timesteps(10, count, spacing)


def test_unsuitable_spacings_are_refused() -> None:
    with pytest.raises(
        ValueError, match="fast27 needs num_train_timesteps = 1000 and num_inference_steps = 27, not 1000 and 50"
    ):
        sampling_timesteps(1000, 50, "fast27")
    with pytest.raises(ValueError, match=r"fast27 needs .* not 4000 and 27"):
        sampling_timesteps(4000, 27, "fast27")
    with pytest.raises(ValueError, match="not 'even'"):
        sampling_timesteps(1000, 10, "even")  # type: ignore[arg-type]


def test_step_pairs_end_at_the_clean_sample() -> None:
    assert step_pairs([9, 4, 0], 10) == [(9, 4), (4, 0), (0, -1)]
    assert step_pairs((5,), 10) == [(5, -1)]


def test_an_explicit_list_is_taken_as_it_is() -> None:
    assert explicit_timesteps(1000, (997, 800, 3)) == [997, 800, 3]
    assert explicit_timesteps(1, [0]) == [0]
    assert explicit_timesteps(1000, sampling_timesteps(1000, 27, "fast27")) == sampling_timesteps(1000, 27, "fast27")


@pytest.mark.parametrize("timesteps", [[10, 5], [5, 5], [0, 5], [5, -1], [-1], [9, 5, 6]])
def test_bad_lists_are_refused(timesteps: list[int]) -> None:
    for refuse in (lambda: explicit_timesteps(10, timesteps), lambda: step_pairs(timesteps, 10)):
        with pytest.raises(ValueError, match=r"strictly descending and in 0\.\.9, not \[.*\]"):
            refuse()


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="timesteps_list is empty"):
        step_pairs([], 10)
