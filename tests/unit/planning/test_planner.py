"""Plans: what fits is planned, what cannot is refused with what would, and the job's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import plan as job

from unclip.planning.assumptions import PlanConfig
from unclip.planning.estimate import limit_bytes
from unclip.planning.planner import CannotFit, Planner


def planner(**settings: object) -> Planner:
    return Planner(PlanConfig.from_dict({"stage": "prior", "gpu": "h100", "gpus": 64} | settings))


def test_the_largest_micro_batch_that_fits() -> None:
    plans = planner(gpus=2, global_batch=4096)
    zero = plans.config.zero
    best = plans.best(zero, 2)
    assert best is not None
    assert best.memory.total <= limit_bytes(plans.plan)
    larger = plans.step(zero, 2, 2 * best.shape.microbatch)
    assert larger.memory.total > limit_bytes(plans.plan) or best.shape.accumulation == 1
    assert best.samples == 4096


def test_days_and_cost_follow_from_the_step() -> None:
    plans = planner(price=2.0, steps=1000)
    run = plans.chosen()
    assert run.days == pytest.approx(1000 * run.step.seconds / 86400)
    assert run.cost == pytest.approx(run.days * 24 * 64 * 2.0)
    assert run.images_per_second == pytest.approx(4096 / run.step.seconds)
    assert 0 < run.mfu < plans.plan.utilization


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(CannotFit, match=r"optimizer \d.*What would fit: --zero 1"):
        planner(gpu="t4", zero=0, precision="fp32", global_batch=64).chosen()


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(CannotFit, match=r"gpus = 65 .* 64 would"):
        planner(gpus=65).chosen()


def test_the_job_writes_tables_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "debug", "--stage", "prior", "--gpus", "2", "--zero", "3"]
    assert job.main([*flags, "--output", "json", "--curve", str(tmp_path / "curve.png")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["chosen"]["step"]["workers"] == 2
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert job.main(flags) == 0
    assert "micro-batch" in capsys.readouterr().out
    assert job.main([*flags[:-3], "3"]) == 2
