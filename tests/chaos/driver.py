"""Trains the run that a file describes, as `jobs/train_*.py` do: a driver that tests can kill."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import yaml

from unclip.cluster.jobs import train_job
from unclip.training.config import TrainConfig


def main(path: str) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, whoever started the tests
    config = TrainConfig.from_dict(yaml.safe_load(Path(path).read_text()))
    return train_job("chaos", {"chaos": lambda: config}, ["--recipe", "chaos"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
