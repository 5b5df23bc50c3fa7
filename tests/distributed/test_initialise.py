"""A new run of two processes that begins with the weights of a run that is still trained."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.support.ranks import run_ranks
from torch import nn

from unclip.training import zero_state
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.initialise import initialise
from unclip.training.optim import OptimizerConfig
from unclip.training.saver import Saver


def engine_of(value: float) -> Engine:
    module = nn.Linear(7, 5)
    nn.init.constant_(module.weight, value)
    zero, optimizer = ZeroConfig(stage=3, precision="fp32"), OptimizerConfig(learning_rate=0.1)
    return Engine(module, optimizer, zero, microbatch_size=1, accumulation_steps=1, device=torch.device("cpu"))


def begun(rank: int, world_size: int, folder: Path) -> list[float]:
    """What this rank's slice of the weight begins with, where each rank finds another newest checkpoint."""
    for value in range(world_size):
        saver = Saver(
            f"{folder}/{value}/checkpoints", engine_of(value), facts={}, keep_last=1, keep_every_steps=None, limit_s=60
        )
        saver.start({"step": 1}, objective=None)
        saver.wait()
    engine = engine_of(9.0)
    initialise(engine, f"{folder}/{rank}")
    weights = [fragment.tensors["ema"] for fragment in zero_state.fragments(engine) if fragment.name == "weight"]
    return torch.cat(weights).unique().tolist()


def test_all_ranks_begin_with_the_checkpoint_that_rank_0_found(tmp_path: Path) -> None:
    assert run_ranks(begun, 2, tmp_path) == [[0.0], [0.0]]
