"""Engines over tiny stages: networks that count their work, and what to do with an engine and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request, Result, Ticket
from unclip.pipelines.stages import StageConfig

MakeEngine = Callable[..., Engine]


class CountedNetwork(nn.Module):
    """A network, and the rows of each of its forward passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[int] = []
        self.prepared: list[int] = []

    def prepare(self, cond):
        self.prepared.append(cond.batch_size)
        return self.network.prepare(cond)

    def forward(self, x_t, timesteps, cond):
        self.calls.append(len(x_t))
        return self.network(x_t, timesteps, cond)


def run(engine: Engine, most: int = 100_000) -> None:
    """Steps until there is no work left."""
    for _ in range(most):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"still at work after {most} steps")


def made(engine: Engine, request: Request) -> Result:
    """The request alone."""
    ticket = engine.submit(request)
    run(engine)
    return ticket.result(0)


def assert_same_pictures(mine: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray]) -> None:
    """Float rounding may take a pixel over the border between two of the 256 values, and no further.

    Where it did, the stages behind were told another picture, of which they may make more than a level.
    """
    assert mine.keys() == theirs.keys()
    told_the_same = True
    for size in sorted(mine):
        difference = np.abs(mine[size].astype(int) - theirs[size].astype(int))
        assert difference.max() <= 1 or not told_the_same, f"{size} pixels"
        assert (difference > 0).mean() < 0.01, f"{size} pixels"
        told_the_same = told_the_same and not difference.any()


def ended(tickets: list[Ticket]) -> list[type | None]:
    """The type of what each raised, None for a result."""
    return [None if ticket.exception(0) is None else type(ticket.exception(0)) for ticket in tickets]


def unit(seed: int, width: int = 8) -> torch.Tensor:
    embed = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return embed / embed.norm()


def randomized(config: StageConfig) -> nn.Module:
    """The network of a stage with weights that are nowhere zero."""
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model
