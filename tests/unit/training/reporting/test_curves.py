"""Curves: what is drawn is what the run folders say, and the picture is there."""

from __future__ import annotations

import importlib.util
import io
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tests.support.run_records import add_validation, record, restart

from unclip.training.reporting.curves import Curves, draw_curves, figure_of, smoothed
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@pytest.fixture(scope="module")
def watch() -> ModuleType:
    file = Path(__file__).parents[4] / "jobs" / "watch.py"
    spec = importlib.util.spec_from_file_location("watch", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, *, loss_at: float = 1.0) -> RunFolder:
    run = RunFolder(str(folder))
    storage.write_json(f"{folder}/config.json", {"stage": "prior"})
    for step in (1, 2, 3, 4, 3, 4, 5):  # a restart went back to step 2
        run.append(run.metrics_uri, record(step, loss=loss_at / 10**step))
    run.append(run.restarts_uri, restart(2))
    run.append(run.skipped_uri, {"step": 4, "ids": [1]})
    add_validation(run, 2, 0.5)
    return run


def panels(figure: Figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def test_panels_hold_the_values_of_every_run(tmp_path: Path) -> None:
    runs = [written(tmp_path / "a" / "run"), written(tmp_path / "b" / "run", loss_at=2.0)]
    figure = figure_of([Curves.read(run, name, "red") for run, name in zip(runs, ("a/run", "b/run"), strict=True)])
    shown = panels(figure)
    assert list(shown) == [
        "loss",
        "gradient norm",
        "learning rate",
        "images/s",
        "memory of a worker, GiB",
        "model FLOPs of peak, %",
        "time of a/run, %",
        "time of b/run, %",
        "validation: loss",
    ]
    loss = shown["loss"]
    lines = [line.get_xydata() for line in loss.lines]
    for scale in (1.0, 2.0):
        expected = [[step, scale / 10**step] for step in range(1, 6)]
        assert any(line.shape == (5, 2) and np.allclose(line, expected) for line in lines)
    assert loss.get_yscale() == "log"
    assert any(list(line.get_xdata()) == [2, 2] and line.get_linestyle() == "--" for line in loss.lines)
    assert any(list(line.get_xdata()) == [4] and line.get_marker() == "|" for line in loss.lines)
    assert shown["gradient norm"].get_yscale() == "linear"
    assert [line.get_xydata().tolist() for line in shown["validation: loss"].lines[:1]] == [[[2.0, 0.5]]]
    assert len(shown["time of a/run, %"].collections) == 7
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["a/run", "b/run"]


def test_runs_without_skipped_steps_are_laid_out(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    for step in range(1, 6):
        run.append(run.metrics_uri, record(step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where it gives the layout up
        figure_of([Curves.read(run, "run", "red")]).savefig(io.BytesIO(), format="png")


def test_buckets_of_timesteps_share_a_panel(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    for step, scale in ((4, 1.0), (6, 2.0)):
        metrics = {"loss": 0.5, "loss_t000-499": scale, "loss_t500-999": 3 * scale, "mse": 0.25}
        line = {"step": step, "seconds": 1.0, "metrics": metrics, "samples": None}
        run.append(run.validation_uri, line)
    shown = panels(figure_of([Curves.read(run, "run", "red")]))
    assert list(shown)[-3:] == ["validation: loss", "validation: mse", "last validation: loss by timestep"]
    lines = [line.get_xydata() for line in shown["last validation: loss by timestep"].lines]
    assert np.allclose(lines[-1], [[249.5, 2.0], [749.5, 6.0]])


def test_smoothing() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(smoothed(noise)) < 0.5
    assert np.allclose(smoothed(np.full(50, 3.0)), 3.0)
    line = np.arange(100.0)
    assert np.allclose(smoothed(line)[10:-10], line[10:-10])
    reach = 10
    by_hand = [noise[max(0, i - reach) : i + reach + 1].mean() for i in range(400)]
    assert np.allclose(smoothed(noise), by_hand)


def test_nothing_logged_nothing_drawn(tmp_path: Path) -> None:
    assert not draw_curves([RunFolder(str(tmp_path / "run"))], str(tmp_path / "out.png"))
    assert not (tmp_path / "out.png").exists()


def test_the_job_writes_a_picture(tmp_path: Path, watch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.png"
    assert watch.main([written(tmp_path / "run").uri, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(io.BytesIO(out.read_bytes())) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000


def test_the_job_follows_runs_until_they_have_ended(
    tmp_path: Path, watch: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run")
    run.finish({"step": 5})
    assert watch.main([run.uri, "--out", str(tmp_path / "c.png"), "--follow", "--every-s", "0.1"]) == 0
    assert "prior:   5% step 5/100" in capsys.readouterr().err


def test_the_job_does_not_wait_for_a_driver_that_is_gone(
    tmp_path: Path, watch: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arguments = written(tmp_path / "run"), ["--out", str(tmp_path / "c.png"), "--follow", "--every-s", "0.1"]
    assert watch.main([run.uri, *arguments]) == 0  # one that ended and took its file away
    assert "prior: nobody trains this run; its job goes on with it" in capsys.readouterr().err
    monkeypatch.setattr(watch, "SILENT_S", 1.0)
    storage.write_json(run.driver_uri, {"beat": 0})

    def beat() -> None:
        for beat in range(1, 20):
            storage.write_json(run.driver_uri, {"beat": beat})
            time.sleep(0.1)

    lives = threading.Thread(target=beat)
    lives.start()
    assert watch.main([run.uri, *arguments]) == 0  # one that is killed after two seconds
    assert not lives.is_alive()


def test_the_job_refuses_what_is_no_run(tmp_path: Path, watch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([str(tmp_path / "none"), "--out", str(tmp_path / "c.png")]) == 2
    assert "none': not a run folder" in capsys.readouterr().err
