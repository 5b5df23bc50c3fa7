"""What a training job's script answers without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from unclip.cluster.jobs import REFUSED, train_job
from unclip.recipes import RECIPES
from unclip.training.run_folder import RunFolder


def test_a_finished_run_whose_checkpoints_were_deleted_cannot_be_exported(
    openmoji: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(str(tmp_path / "run")).finish({"step": 10**9, "seconds": 1.0})
    settings = (f"run={tmp_path}/run", f"bundle={tmp_path}/bundle", f"data.path={openmoji}/256/train")
    argv = ["--recipe", "debug", *(word for setting in settings for word in ("--set", setting))]
    assert train_job(None, RECIPES["upsampler_256"], argv) == REFUSED
    assert "has no checkpoint to export" in capsys.readouterr().err
