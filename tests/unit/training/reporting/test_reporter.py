"""The reporter: every view gets everything, and none can harm another one or the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.run_records import record, run_config

from unclip.training.config import TrainConfig
from unclip.training.reporting import reporter
from unclip.training.reporting.reporter import Reporter
from unclip.training.reporting.run_tail import News
from unclip.training.run_folder import RunFolder


class Collecting:
    """A view that remembers."""

    name = "the collector"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    def open(self, config: TrainConfig) -> None:
        pass

    def show(self, news: News) -> None:
        self.steps += [line["step"] for line in news.records]

    def close(self) -> None:
        self.is_closed = True


class Failing(Collecting):
    name = "the failing one"

    def show(self, news: News) -> None:
        raise ConnectionError("no network")


class Stuck(Collecting):
    name = "the stuck one"

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def open(self, config: TrainConfig) -> None:
        self.release.wait(60)


def report_until(
    seen: Collecting, views: Sequence[Collecting], run: RunFolder, *, then: dict[str, Any] | None = None
) -> None:
    """A block that ends right after the record `then`, once `seen` has shown those before it."""
    with Reporter(run_config(run.uri, tensorboard=False), views):
        deadline = time.monotonic() + 30
        while not seen.steps and time.monotonic() < deadline:
            time.sleep(0.05)
        assert seen.steps == [1]
        if then is not None:
            run.append(run.metrics_uri, then)


def test_everything_is_shown_by_the_end_of_the_block(tmp_path: Path) -> None:
    run, view = RunFolder(str(tmp_path)), Collecting()
    run.append(run.metrics_uri, record(1))
    report_until(view, [view], run, then=record(2))
    assert view.steps == [1, 2]
    assert view.is_closed


def test_a_view_that_fails_is_switched_off_with_one_warning(tmp_path: Path) -> None:
    run, good, bad = RunFolder(str(tmp_path)), Collecting(), Failing()
    run.append(run.metrics_uri, record(1))
    with pytest.warns(UserWarning, match="the failing one is switched off: ConnectionError: no network") as caught:
        report_until(good, [bad, good], run, then=record(2))
    assert len(caught) == 1
    assert (good.steps, bad.is_closed) == ([1, 2], True)


def test_a_view_that_waits_for_ever_holds_up_nothing_but_the_end_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "CLOSE_LIMIT_S", 1.0)
    run, good, stuck = RunFolder(str(tmp_path)), Collecting(), Stuck()
    run.append(run.metrics_uri, record(1))
    with pytest.warns(UserWarning, match="the stuck one was not done"):
        report_until(good, [stuck, good], run)
    stuck.release.set()
    assert (good.steps, good.is_closed) == ([1], True)


def test_views_are_those_of_the_configuration(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.append(run.metrics_uri, record(1))
    mlflow = {"tracking_uri": str(tmp_path / "mlflow")}
    with Reporter(run_config(run.uri, mlflow=mlflow)):
        pass
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert list((tmp_path / "mlflow").glob("*/*/metrics/train/loss"))
