"""Records reach the run folder in order, whatever the store does meanwhile; what cannot be written is an error at the end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from unclip.training.metric_log import MetricLog
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


def test_records_are_there_at_the_end_in_order(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    with MetricLog(run) as log:
        for step in range(1, 51):
            log.metrics({"step": step, "loss": 1 / step})
            if step % 10 == 0:
                log.skipped({"step": step, "ids": [step]})
    assert run.metrics() == run.lines(run.metrics_uri) == [{"step": step, "loss": 1 / step} for step in range(1, 51)]
    assert run.skipped() == [{"step": step, "ids": [step]} for step in (10, 20, 30, 40, 50)]
    assert storage.read_json(run.progress_uri) == {"step": 50, "loss": 1 / 50}


def test_a_store_that_fails_delays_records_and_nobody_waits(tmp_path: Path) -> None:
    """A file where the run folder should be: nothing can be written until it is gone."""
    run = RunFolder(str(tmp_path / "run"))
    in_the_way = Path(run.uri)
    in_the_way.write_text("")
    with MetricLog(run, retry_s=0.05) as log:
        for step in range(1, 6):
            log.metrics({"step": step})
        time.sleep(0.2)
        assert in_the_way.is_file()
        in_the_way.unlink()
        log.metrics({"step": 6})
    assert [record["step"] for record in run.lines(run.metrics_uri)] == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_written_is_an_error_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    run = RunFolder(str(tmp_path / "run"))

    def write() -> None:
        with MetricLog(run, retry_s=0.05, flush_limit_s=0.2) as log:
            log.metrics({"step": 1})
            log.metrics({"step": 2})

    with pytest.raises(OSError, match=rf"4 records of {run.uri} could not be written: .*{run.uri}"):
        write()


def test_an_error_of_the_run_is_not_hidden_and_its_records_are_kept(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))

    def diverge() -> None:
        with MetricLog(run) as log:
            log.skipped({"step": 1})
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        diverge()
    assert run.skipped() == [{"step": 1}]
