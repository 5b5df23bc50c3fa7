"""What is seen of a run: the panel on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tests.support.run_records import record, restart, run_config

from unclip.training.reporting import panel
from unclip.training.reporting.panel import PHASE_STYLES, RunPanel, describe, duration, sparkline
from unclip.training.reporting.run_tail import News
from unclip.training.reporting.terminal import Screen, TerminalView


def rendered(shown: RunPanel, width: int = 100) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(shown)
    return console.export_text()


def test_the_panel_shows_what_the_records_have() -> None:
    shown = RunPanel("prior", "runs/x")
    assert "waiting for the first steps" in rendered(shown)
    validation = {"step": 10, "metrics": {"loss": 0.125, "loss_t000-099": 0.75}, "samples": None}
    records = (record(10, checkpoint_step=10), record(25, checkpoint_step=10, skipped_steps=3))
    assert shown.update(News(records=records, validations=(validation,), cost={"text": "2.5 GPU-hours"})) == []
    text = " ".join(rendered(shown).replace("│", " ").split())
    for part in (
        "prior runs/x",
        "25% ",
        "step 25/100 2 min left",
        "loss 0.0400",
        "images/s 4.0",
        "gradient norm 0.5",
        "learning rate 0.0001",
        "samples 200",
        "MFU 41.5%",
        "workers 2",
        "memory 3.00 GiB",
        "saved step 10, 30 s ago",
        "skipped steps 3",
        "█▁",
        "data 10%",
        "backward 50%",
        "validation of step 10 loss 0.125",
        "cost 2.5 GPU-hours",
    ):
        assert part in text, part
    assert "loss_t000-099" not in text


def test_what_is_not_known_is_not_shown() -> None:
    shown = RunPanel("prior", "runs/x")
    bare = {"step": 1, "max_steps": 2, "progress": 0.5, "loss": float("nan"), "mfu": None}
    shown.update(News(records=(bare,)))
    text = rendered(shown)
    assert "step 1/2" in text
    for part in ("MFU", "time", "memory", "saved", "restarts", "validation", "cost"):
        assert part not in text


def test_the_bar_of_time_is_split_as_the_time_was() -> None:
    shown = RunPanel("prior", "runs/x")
    shown.update(News(records=(record(1, time_data=0.5, time_forward=0.25, time_backward=0.25, time_other=0.0),)))
    console = Console(file=io.StringIO(), width=100)
    cells = {
        segment.style.color.name: len(segment.text)
        for segment in console.render(shown)
        if set(segment.text) == {"█"} and segment.style and segment.style.color
    }
    half, quarter = panel.BAR_WIDTH // 2, panel.BAR_WIDTH / 4
    assert cells[PHASE_STYLES["data"]] == half
    assert abs(cells[PHASE_STYLES["forward"]] - quarter) < 1
    assert sum(cells.values()) == panel.BAR_WIDTH


def test_restarts_and_failed_checkpoints_are_said_once_and_stay_on_the_panel() -> None:
    shown = RunPanel("prior", "runs/x")
    failing = record(10, checkpoint_error="[Errno 28] No space left on device")
    said = shown.update(News(records=(failing,), restarts=(restart(5),)))
    assert said == [
        "restart (failure) from step 5 with 2 workers after 14 s: rank 1 was killed by signal 9",
        "checkpoint failed at step 10, training goes on: [Errno 28] No space left on device",
    ]
    assert shown.update(News(records=(failing | {"step": 11},))) == []
    text = rendered(shown)
    assert "restarts: 1, the last" in text
    assert "newest checkpoint failed: [Errno 28]" in text
    shown.update(News(records=(record(12),)))
    assert "newest checkpoint failed" not in rendered(shown)


def test_a_missed_validation_is_said_and_the_last_one_stays() -> None:
    shown = RunPanel("prior", "runs/x")
    done = {"step": 10, "metrics": {"loss": 0.125}, "samples": None}
    missed = {"step": 20, "metrics": {}, "samples": None, "missed": "its checkpoint was collected"}
    said = shown.update(News(records=(record(25),), validations=(done, missed)))
    assert said == ["validation of step 20 missed: its checkpoint was collected"]
    assert "validation of step 10" in rendered(shown)


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    view = TerminalView()
    view.open(run_config("runs/x"))
    for step in (10, 20, 40):
        view.show(News(records=(record(step, loss=0.125, images_per_second=52.06, eta_s=73.4),)))
    view.show(News(restarts=(restart(40),)))
    view.close()
    assert capsys.readouterr().err.splitlines() == [
        "prior:  10% step 10/100, loss 0.1250, 52.1 images/s, 73 s left",
        "prior: restart (failure) from step 40 with 2 workers after 14 s: rank 1 was killed by signal 9",
        "prior:  40% step 40/100, loss 0.1250, 52.1 images/s, 73 s left",
    ]


def test_a_run_that_never_reported_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    view = TerminalView()
    view.open(run_config("runs/x"))
    view.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_keeps_the_last_state_and_what_was_said() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    shown = RunPanel("prior", "runs/x")
    screen = Screen([shown], console)
    shown.update(News(records=(record(60),)))
    screen.say("prior", "restart [failure]")
    screen.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "prior: restart [failure]" in text
    assert "step 60/100" in text.rsplit("╭", 1)[-1]


def test_texts() -> None:
    assert describe({"step": 1, "max_steps": 2, "progress": 0.5}) == "step 1/2"
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert [duration(s) for s in (45, 720, 11_100, 200_000)] == ["45 s", "12 min", "3 h 05 min", "2 d 7 h"]
