"""Where the networks of a job run."""

from __future__ import annotations

import torch

from unclip.config.base import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By a job's `precision`."""


def chosen_device(name: str) -> torch.device:
    """`auto`, a CUDA device where there is one, or the one named; `ConfigError` where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
