from __future__ import annotations

import math

import psutil
import pytest
import torch

from unclip.training.clock import Clock
from unclip.training.config import LoopConfig
from unclip.training.window import LogWindow, peak_memory

CPU = torch.device("cpu")


def test_means_are_over_the_steps_that_counted() -> None:
    window = LogWindow()
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": torch.tensor(loss), "accuracy": torch.tensor(0.5)})
        window.skip()
    means, _ = window.close(1, CPU)
    assert means == {"accuracy": 0.5, "loss": 3.0}
    assert window.steps == 6


def test_a_window_of_skipped_steps_has_no_means() -> None:
    window = LogWindow()
    window.skip()
    assert window.close(1, CPU)[0] == {}


def test_the_peak_stays_when_memory_is_given_back() -> None:
    block = torch.ones(2**27)  # half a GiB
    resident = psutil.Process().memory_info().rss
    del block
    assert psutil.Process().memory_info().rss < resident - 2**28
    assert peak_memory(CPU) > resident - 2**22  # the system counts pages in batches
    assert peak_memory(CPU) < psutil.virtual_memory().total


def test_progress_and_the_rest_by_steps_and_by_time() -> None:
    steps = LoopConfig(max_steps=200, global_batch_size=4, microbatch_size=4)
    clock = Clock(step=50, seconds=30.0)
    assert (clock.progress(steps), clock.eta_s(steps), clock.expected_steps(steps)) == (0.25, 90.0, 200)
    limited = LoopConfig(max_steps=200, global_batch_size=4, microbatch_size=4, time_limit_s=60.0)
    assert (clock.progress(limited), clock.eta_s(limited), clock.expected_steps(limited)) == (0.5, 30.0, 100)
    assert not clock.finished(limited)
    assert Clock(step=51, seconds=60.0).finished(limited)
    assert Clock(step=200).finished(steps)
    assert math.isfinite(Clock().eta_s(steps))
    assert Clock(step=60, seconds=30.0).eta_s(steps) == pytest.approx(70.0)
