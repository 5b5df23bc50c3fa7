"""DeepSpeed at every ZeRO stage, precision and kind of offload against plain PyTorch on one process.

One process runs here, 2 and 4 processes in one launch each (imports cost more than the cases); tests read the answers.
Offload to disk needs an operator that takes minutes to compile: tests/chaos/test_zero_disk.py.
"""

from __future__ import annotations

import pytest
from tests.support import zero
from tests.support.ranks import run_ranks
from tests.support.zero import Answers

from unclip.training.optim import parameter_groups


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Answers]:
    """By number of processes."""
    folder = tmp_path_factory.mktemp("zero")
    found = {1: zero.all_cases(0, folder / "1", list(zero.PLAIN))}
    for world_size, function in ((2, zero.two_ranks), (4, zero.four_ranks)):
        ranks = run_ranks(function, world_size, folder / str(world_size))
        assert all(rank == ranks[0] for rank in ranks)  # norms, skipped steps and states are the same on every rank
        found[world_size] = ranks[0]
    return found


@pytest.fixture(params=[*zero.PLAIN, *zero.ON_CPU])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(case: str, answers: dict[int, Answers]) -> list[Answers]:
    """The answers about one case, of each number of processes."""
    return [of_size[case] for of_size in answers.values() if case in of_size]


def test_training_is_plain_adamw_on_the_global_batch(case: str, found: list[Answers]) -> None:
    for answer in found:
        zero.check_training(case, answer)


def test_continuing_is_going_on(found: list[Answers]) -> None:
    for answer in found:
        zero.check_continuing(answer)


def test_a_step_that_is_not_finite_changes_nothing(found: list[Answers]) -> None:
    for answer in found:
        zero.check_spoiled_step(answer)


def test_precisions_compute_in_bfloat16_and_update_in_float32(case: str, found: list[Answers]) -> None:
    for answer in found:
        zero.check_precision(case, answer)


def test_fragments_cover_every_element_once(found: list[Answers]) -> None:
    for answer in found:
        zero.check_coverage(answer)


def test_nothing_lies_on_disk(case: str, found: list[Answers]) -> None:
    for answer in found:
        zero.check_disk(case, answer)


def test_nothing_is_compiled_for_an_all_reduce_that_training_does_not_use(answers: dict[int, Answers]) -> None:
    assert all(not answers[size]["compiled"]["all-reduce"] for size in (1, 2, 4))


def test_the_cases_have_two_groups_and_clip() -> None:
    assert [len(group["params"]) for group in parameter_groups(zero.Tiny(317), 0.1)] == [3, 6]
    for width in (317, 3200):
        assert min(zero.plain_torch(zero.STEPS, "fp32", width)[1]) > zero.OPTIMIZER.grad_clip
