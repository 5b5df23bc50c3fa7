"""What the driver shows of a run, read from the run's own file."""

from __future__ import annotations

import pytest

from unclip.cluster.progress import ProgressWatcher, describe
from unclip.utils import storage


def test_one_line_where_there_is_no_terminal(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"{tmp_path}/run/progress.json"
    with ProgressWatcher(uri, "decoder"):
        record = {
            "step": 40,
            "max_steps": 500,
            "progress": 0.25,
            "loss": 0.125,
            "images_per_second": 52.06,
            "eta_s": 73.4,
        }
        storage.write_json(uri, record)
    shown = capsys.readouterr().err
    assert shown == "decoder:  25% step 40/500, loss 0.1250, 52.1 images/s, 73 s left\n"


def test_a_run_that_never_reported_shows_nothing(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressWatcher(f"{tmp_path}/run/progress.json", "decoder"):
        pass
    assert capsys.readouterr().err == ""


def test_only_what_is_known_is_described() -> None:
    assert describe({"step": 1, "max_steps": 2, "progress": 0.5}) == "step 1/2"
