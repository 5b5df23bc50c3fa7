"""What may be offloaded where, and the folders that it is swapped to."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from unclip.config.base import ConfigError
from unclip.training.engine import ZeroConfig
from unclip.training.offload import SwapFolder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0, "precision": "bf16"}, "zero.precision = 'bf16'.*zero.stage must be 1, 2 or 3, not 0"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "zero.offload_optimizer = 'cpu' needs zero.stage 1 or more, not 0"),
        (
            {"stage": 2, "offload_optimizer": "nvme"},
            "zero.offload_optimizer = 'nvme' needs zero.stage 3 or more, not 2",
        ),
        ({"stage": 2, "offload_parameters": "cpu"}, "zero.offload_parameters = 'cpu'.*zero.stage must be 3, not 2"),
        (
            {"stage": 3, "offload_parameters": "nvme", "precision": "autocast"},
            "zero.offload_parameters = 'nvme' needs zero.precision = 'bf16', not 'autocast'",
        ),
        ({"stage": 3, "offload_optimizer": "nvme"}, "zero.nvme_path to be a local folder, not None"),
        ({"stage": 3, "offload_optimizer": "nvme", "nvme_path": "s3://b/x"}, "local folder, not 's3://b/x'"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ZeroConfig(**settings)


def test_what_goes_together() -> None:
    for stage in (1, 2, 3):
        assert not ZeroConfig(stage=stage, precision="bf16", offload_optimizer="cpu").swaps
    assert ZeroConfig(stage=3, precision="fp32", offload_optimizer="nvme", nvme_path="/fast").swaps
    assert ZeroConfig(stage=3, precision="bf16", offload_parameters="nvme", nvme_path="/fast").swaps


def test_a_swap_folder_is_gone_when_it_is_no_longer_used(tmp_path: Path) -> None:
    folder = SwapFolder(str(tmp_path / "disk"))
    path = folder.path
    (path / "state.swp").write_bytes(b"x")
    del folder
    gc.collect()
    assert not path.exists()


def test_folders_in_use_stay_and_those_of_killed_processes_go(tmp_path: Path) -> None:
    mine = SwapFolder(str(tmp_path))
    hold = "\n".join(
        (
            "import sys, time",
            "from unclip.training.offload import SwapFolder",
            "folder = SwapFolder(sys.argv[1])",
            "print(folder.path, flush=True)",
            "time.sleep(60)",
        )
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    left = Path(other.stdout.readline().strip())
    third = SwapFolder(str(tmp_path))
    assert left.exists()
    assert mine.path.exists()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert left.exists()  # nothing was there to delete it
    SwapFolder(str(tmp_path)).close()
    assert not left.exists()
    assert mine.path.exists()
    assert third.path.exists()


def test_a_folder_that_goes_just_now_is_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "swap-gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked into
    folder = SwapFolder(str(tmp_path))
    assert folder.path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"zero.nvme_path = .*file/disk' cannot be written"):
        SwapFolder(str(tmp_path / "file" / "disk"))
