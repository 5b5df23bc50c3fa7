"""What is said of a job's hours and their price, and that the hours of all its drivers add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.cluster import kill_a_worker, once, step_of

from unclip.cluster import cost
from unclip.cluster.cost import Account, Hours
from unclip.cluster.fit import fit
from unclip.cluster.preflight import Node
from unclip.config.cost import CostConfig
from unclip.recipes import RECIPES
from unclip.training.run_folder import RunFolder

EIGHT = Hours.of(0.4 * 3600, Node(cpus=64.0, gpus=8.0), "H100")


@pytest.mark.parametrize(
    ("hours", "prices", "words"),
    [
        (EIGHT, CostConfig(), "3.2 GPU-hours, 25.6 CPU-hours, about $8.00 (at $2.50 a GPU-hour of H100: a guess)"),
        (EIGHT, CostConfig(gpu_hour=2.0), "3.2 GPU-hours, 25.6 CPU-hours, about $6.40 (at $2.00 a GPU-hour)"),
        (
            EIGHT,
            CostConfig(gpu_hour=2.0, cpu_hour=0.05),
            "3.2 GPU-hours, 25.6 CPU-hours, about $7.68 (at $2.00 a GPU-hour, $0.050 a CPU-hour)",
        ),
        (
            EIGHT + Hours.of(3600, Node(0.0, 1.0), "T4"),
            CostConfig(),
            "4.2 GPU-hours, 25.6 CPU-hours, about $8.35 (at $2.50 a GPU-hour of H100, $0.35 a GPU-hour of T4: a guess)",
        ),
        (EIGHT + Hours.of(3600, Node(0.0, 1.0)), CostConfig(), "4.2 GPU-hours, 25.6 CPU-hours"),
        (Hours(0.25), CostConfig(), "0.25 CPU-hours"),
        (Hours(0.25), CostConfig(gpu_hour=2.0), "0.25 CPU-hours"),
        (Hours(0.0001), CostConfig(), "under 0.01 CPU-hours"),
    ],
)
def test_words(hours: Hours, prices: CostConfig, words: str) -> None:
    assert hours.words(prices) == words


def test_a_driver_adds_to_those_before_it(tmp_path: Path) -> None:
    uri, prices = str(tmp_path / "cost.json"), CostConfig(gpu_hour=2.0)
    for _ in range(2):
        account = Account(uri, prices)
        account.show(Hours(4.0, {"H100": 0.5}))
        account.show(Hours(8.0, {"H100": 1.0}))  # so soon after the first, this is not written
        account.write()
    other = Account(uri, prices)
    other.show(Hours(0.0, {"A100": 1.0}))
    assert json.loads(Path(uri).read_text()) == {
        "gpu_hours": 3.0,
        "cpu_hours": 16.0,
        "dollars": 6.0,
        "text": "3.0 GPU-hours, 16.0 CPU-hours, about $6.00 (at $2.00 a GPU-hour)",
        "gpu_hours_by_kind": {"H100": 2.0, "A100": 1.0},
    }


def test_a_killed_driver_loses_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, now = str(tmp_path / "cost.json"), [1000.0]
    monkeypatch.setattr(cost.time, "monotonic", lambda: now[0])
    killed = Account(uri, CostConfig())
    for minute in range(4):
        killed.show(Hours(float(minute)))
        now[0] += 60.0
    assert Account(uri, CostConfig()).record()["cpu_hours"] == 3.0


@pytest.mark.parametrize(
    "content",
    [
        '{"cpu_hours": 1',
        "[]",
        '{"cpu_hours": "?", "gpu_hours_by_kind": {}}',
        '{"cpu_hours": 1, "gpu_hours_by_kind": []}',
    ],
)
def test_a_damaged_file_costs_the_figures_only(content: str, tmp_path: Path) -> None:
    uri = tmp_path / "cost.json"
    uri.write_text(content)
    assert Account(str(uri), CostConfig()).record()["cpu_hours"] == 0.0


def test_hours_of_killed_workers_and_of_resumed_drivers_add_up(openmoji: str, tmp_path: Path) -> None:
    config = RECIPES["clip"]["debug"]().merged(
        {
            "run": f"{tmp_path}/run",
            "bundle": None,
            "data": {"path": f"{openmoji}/64/train"},
            "loop": {"max_steps": 16, "log_every": 1, "checkpoint_every_s": 0.0},
            "cost": {"cpu_hour": 0.05},
        }
    )
    run = RunFolder(config.run)
    with once(lambda: step_of(run) >= 3, kill_a_worker):
        first = fit(config)
    assert len(run.lines(run.restarts_uri)) == 1
    resources = config.resources
    claimed = resources.cpus_per_worker + resources.data_cpus
    assert first["cost"]["cpu_hours"] * 3600 > claimed * first["seconds"]  # those of the killed worker beside these
    second = fit(config.merged({"loop": {"max_steps": 18}}))
    added = (second["cost"]["cpu_hours"] - first["cost"]["cpu_hours"]) * 3600
    assert added > claimed * (second["seconds"] - first["seconds"]) > 0
    assert second["cost"]["dollars"] == pytest.approx(0.05 * second["cost"]["cpu_hours"], abs=1e-4)
    assert json.loads(Path(config.run, "cost.json").read_text()) == second["cost"]
