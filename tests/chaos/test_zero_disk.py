"""DeepSpeed with weights, moments and averages on disk against plain PyTorch; its operator is compiled first."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import zero
from tests.support.ranks import run_ranks
from tests.support.zero import Answers

from unclip.config.base import ConfigError
from unclip.training.offload import require_disk_operator


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of two processes, by case."""
    try:
        require_disk_operator()
    except ConfigError as error:
        pytest.skip(str(error))
    folder: Path = tmp_path_factory.mktemp("zero-disk")
    ranks = run_ranks(zero.two_ranks_with_disks, 2, folder)
    assert ranks[0] == ranks[1]
    answers: Answers = ranks[0]
    return answers


@pytest.mark.parametrize("case", [*zero.ON_DISK])
def test_what_lies_on_disk_is_trained_like_the_rest(case: str, answers: Answers) -> None:
    found = answers[case]
    zero.check_disk(case, found)
    zero.check_training(case, found)
    zero.check_continuing(found)
    zero.check_spoiled_step(found)
    zero.check_precision(case, found)
    zero.check_coverage(found)
