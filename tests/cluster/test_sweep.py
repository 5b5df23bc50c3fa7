"""The sweep: its points are what pipeline and evaluation give by hand, and what was made before it was killed is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from jobs import sweep as job
from tests.support.bundles import save_tiny_bundle

from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.sweep import SweepConfig, run_sweep
from unclip.config.base import ConfigError
from unclip.generation.outputs import decode_png
from unclip.pipelines.pipeline import Pipeline

JOB = Path(__file__).parents[2] / "jobs" / "sweep.py"


@pytest.fixture
def config(more_records: str, tmp_path: Path) -> SweepConfig:
    """Two guidance scales of 6 prompts, by a bundle with random weights and its own CLIP."""
    bundle = str(tmp_path / "bundle")
    save_tiny_bundle(bundle)
    (tmp_path / "prompts.txt").write_text("".join(f"drawing number {number}\n" for number in range(6)))
    return SweepConfig.from_dict(
        {
            "generate": {
                "bundle": bundle,
                "prompts": str(tmp_path / "prompts.txt"),
                "format": "parquet",
                "n": 2,
                "options": {"up_to": 16, "decoder": {"num_inference_steps": 4}},
            },
            "evaluate": {"clip": f"{bundle}/clip", "kid_subsets": 3, "resamples": 100},
            "reference": more_records,
            "decoder": {"guidance_scale": [1, 3]},
            "out": str(tmp_path / "out"),
            "show": 2,
        }
    )


def test_a_killed_sweep_goes_on_and_its_points_are_those_made_by_hand(
    config: SweepConfig, more_records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(config.to_dict()))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(JOB), "--config", str(tmp_path / "sweep.json")]
    process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stderr=subprocess.DEVNULL)
    points = tmp_path / "out" / "points"
    first = points / "decoder.guidance_scale-1"
    deadline = time.monotonic() + 120
    while not (first / "evaluation" / "result.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert job.main(["--config", str(tmp_path / "sweep.json")]) == 0
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [point["settings"] for point in result["points"]] == [{"decoder.guidance_scale": value} for value in (1, 3)]
    assert [point["pictures"] for point in result["points"]] == [12, 12]
    printed = capsys.readouterr().out.splitlines()
    score = result["points"][1]["metrics"]["clip_score"]["mean"]
    assert printed[1].startswith("decoder.guidance_scale 3: FD-CLIP ")
    assert printed[1].endswith(f"CLIP-score {score:.6g}")

    pictures = points / "decoder.guidance_scale-3" / "pictures"
    changes = {"pictures": str(pictures), "reference": more_records, "out": str(tmp_path / "evaluation")}
    by_hand = run_evaluate(config.evaluate.merged(changes))["metrics"]
    assert result["points"][1]["metrics"] == by_hand
    assert result["points"][0]["metrics"] != by_hand
    options = config.generate.options.merged({"decoder": {"guidance_scale": 3.0}})
    prompts = [f"drawing number {number // 2}" for number in range(12)]
    pipeline = Pipeline.from_bundle(config.generate.bundle, options=options)
    expected = pipeline(prompts, [0, 1] * 6, options=options).images[16]
    images = pq.read_table(pictures / "data-00000.parquet").column("image").to_pylist()
    for image, picture in zip(images, expected, strict=True):
        assert np.abs(decode_png(image).astype(int) - picture).max() <= 1
    assert run_sweep(config) == result


def test_a_dry_run_finds_what_is_wrong_with_any_point(
    config: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(config.to_dict()))
    command = ["--config", str(tmp_path / "sweep.json"), "--dry-run"]
    assert job.main(command) == 0
    assert capsys.readouterr().out == f"2 points of 6 prompts would be made and judged, in {tmp_path}/out\n"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert job.main([*command, "--set", "decoder.num_inference_steps=[4,2000]"]) == 2
    assert "2000" in capsys.readouterr().err
    for said in ("evaluate.clip = '/nowhere'", "evaluate.judge = '/nowhere'", "evaluate.inception = '/nowhere'"):
        wrong = said.replace(" = '/nowhere'", "=/nowhere")
        for reference in (config.reference, "null"):
            assert job.main([*command, "--set", wrong, "--set", f"reference={reference}"]) == 2
            assert said in capsys.readouterr().err
    assert job.main([*command, "--set", "reference=/nowhere"]) == 2
    assert "sweep: reference: data folder '/nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generate": {"format": "folder"}}, "generate.format = 'folder'"),
        ({"generate": {"out": "x"}}, "generate.out = 'x': the sweep sets it"),
        ({"evaluate": {"pictures": "x"}}, "evaluate.pictures = 'x': the sweep sets it"),
        ({"decoder": {"guidance_scale": [2, 2]}}, "decoder.guidance_scale = .*has a value twice"),
    ],
)
def test_settings_that_make_no_sweep_are_refused(config: SweepConfig, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.merged(changes)


def test_a_sweep_of_nothing_is_refused(config: SweepConfig) -> None:
    with pytest.raises(ConfigError, match="no values to sweep"):
        run_sweep(config.merged({"decoder": {"guidance_scale": []}}))
