from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from jobs.profile_run import main

from unclip.training.profiling import Profiler, ProfileRequests
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run that has been opened."""
    folder = RunFolder(str(tmp_path / "run"))
    storage.write_json(storage.join(folder.uri, "config.json"), {})
    return folder


def test_the_job_asks_and_worker_0_takes_the_request(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([run.uri, "--steps", "3"]) == 0
    assert f"asked for 3 steps; traces will be in {run.profiles_uri}" in capsys.readouterr().out
    requests = ProfileRequests(run)
    assert (requests.take(), requests.take()) == (3, 0)
    assert not storage.exists(run.profile_request_uri)


def test_a_request_made_while_the_run_goes_on_is_seen(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unclip.training.profiling._LOOK_EVERY_S", 0.01)
    with ProfileRequests(run) as requests:
        assert requests.take() == 0
        assert main([run.uri]) == 0
        while not (steps := requests.take()):
            pass
    assert steps == 5


def test_there_must_be_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert f"run = '{tmp_path / 'none'}' holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "content", ["", "[1]", '"5"', '{"steps": 0}', '{"steps": 101}', '{"stops": 1}', '{"steps": 1}' + " " * 2000]
)
def test_what_is_no_request_is_taken_away_with_a_warning(
    run: RunFolder, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_bytes(run.profile_request_uri, content.encode())
    with caplog.at_level(logging.WARNING):
        assert ProfileRequests(run).take() == 0
    assert "is no request for a profile" in caplog.text
    assert not storage.exists(run.profile_request_uri)


def test_a_profile_has_the_operators_of_its_steps_only(run: RunFolder) -> None:
    profiler = Profiler(run, 2, torch.device("cpu"))
    a = torch.ones(8, 8)
    for step in range(1, 7):
        if step == 3:
            profiler.begin(step=3, steps=2)
            profiler.begin(step=3, steps=50)  # one at a time
        (a @ a) if step in (3, 4) else a.exp()
        profiler.step()
    assert storage.names(run.profiles_uri) == ["step-00000003-rank-00002.json.gz", "step-00000003-rank-00002.txt"]
    trace = json.loads(gzip.decompress((Path(run.profiles_uri) / "step-00000003-rank-00002.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::matmul") == 2
    assert "aten::exp" not in names
    assert "aten::mm" in (Path(run.profiles_uri) / "step-00000003-rank-00002.txt").read_text()


def test_a_profile_that_cannot_be_written_costs_nothing_else(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    Path(run.profiles_uri).write_text("in the way")
    profiler = Profiler(run, 0, torch.device("cpu"))
    profiler.begin(step=1, steps=1)
    profiler.step()
    assert "the profile of step 1 is lost" in caplog.text
