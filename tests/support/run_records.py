"""Run folders with the lines that training, validation and driver write, without any training."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


def run_config(uri: str, **reporting: Any) -> TrainConfig:
    """A small run's configuration in that folder."""
    return RECIPES["prior"]["debug"]().merged({"run": uri, "data": {"path": "/nowhere"}, "reporting": reporting})


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl` at that step of 100."""
    return {
        "step": step,
        "max_steps": 100,
        "samples_seen": 8 * step,
        "seconds": 2.0 * step,
        "progress": step / 100,
        "images_per_second": 4.0,
        "eta_s": 2.0 * (100 - step),
        "learning_rate": 1e-4,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "world_size": 2,
        "time_data": 0.1,
        "time_forward": 0.25,
        "time_backward": 0.5,
        "time_other": 0.15,
        "memory_bytes": 3 * 2**30,
        "flops_per_second": 1e9,
        "mfu": 0.415,
        "skipped_steps": 0,
        "checkpoint_step": 0,
    } | changes


def restart(step: int, reason: str = "rank 1 was killed by signal 9") -> dict[str, Any]:
    """A line of `restarts.jsonl`."""
    return {
        "time": "2030-01-01T00:00:00+00:00",
        "step": step,
        "reason": reason,
        "world_size": 2,
        "seconds": 14.2,
        "kind": "failure",
    }


def add_validation(run: RunFolder, step: int, loss: float, *, color: tuple[int, int, int] = (200, 100, 0)) -> None:
    """A line of `validation.jsonl` and its picture, of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2), color).save(buffer, "PNG")
    samples = f"samples/step-{step:08d}.png"
    storage.write_bytes(storage.join(run.uri, samples), buffer.getvalue())
    run.append(run.validation_uri, {"step": step, "seconds": 1.0, "metrics": {"loss": loss}, "samples": samples})
