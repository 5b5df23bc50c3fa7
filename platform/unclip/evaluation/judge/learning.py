"""How one network of a judge is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from tqdm import tqdm

from unclip.evaluation.judge.config import TrainJudgeConfig
from unclip.evaluation.judge.examples import UNKNOWN, Examples, Labels
from unclip.evaluation.judge.network import JudgeNetwork, as_ink

_TURN, _SHIFT = math.radians(15), 0.15
"""Largest turn, and shift as a share of the side."""
_LEAST, _MOST = 0.7, 1.15
"""Sizes of what is drawn, 1 being its own."""
_GAIN, _NOISE = 0.04, 0.05
"""Largest change of each channel's ink as a share, and largest deviation of noise, of a range of 1."""


def train_network(examples: Examples, fold: int, config: TrainJudgeConfig, bar: tqdm[None]) -> JudgeNetwork:
    """A network that has seen all pictures but those of `fold`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + fold)
        network = JudgeNetwork([len(classes) for classes in examples.classes.values()], config.width)
    network.to(config.device)
    rows = np.flatnonzero(examples.folds != fold)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    generator = torch.Generator().manual_seed(config.seed + fold)
    for chosen in _batches(rows, examples.labels[rows], config, fold):
        ink = augment(as_ink(examples.pictures[chosen]), generator).to(config.device)
        loss = _loss(network(ink), torch.from_numpy(examples.labels[chosen]).to(config.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return network.eval().requires_grad_(False)


def augment(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Changes that leave every attribute as it is, to (B, 3, S, S) of `as_ink`: turned a little, larger or smaller, moved,
    half of them blurred, with noise and colours a little off, as generated pictures are. Not mirrored: hands point left
    and right."""
    turn, x, y, blur, noise, *gains = (torch.rand(8, len(ink), generator=generator) * 2 - 1).unbind(0)
    size = torch.empty(len(ink)).uniform_(_LEAST, _MOST, generator=generator)
    cos, sin = (turn * _TURN).cos() / size, (turn * _TURN).sin() / size
    rows = [torch.stack([cos, sin, x * 2 * _SHIFT], dim=1), torch.stack([-sin, cos, y * 2 * _SHIFT], dim=1)]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(ink.shape), align_corners=False)
    ink = functional.grid_sample(ink, grid, align_corners=False)
    blur = blur.clamp(min=0).view(-1, 1, 1, 1)
    ink = torch.lerp(ink, _blurred(ink), blur) * (1 + _GAIN * torch.stack(gains, dim=1)).view(-1, 3, 1, 1)
    return ink + (noise.abs() * _NOISE).view(-1, 1, 1, 1) * torch.randn(ink.shape, generator=generator)


def _blurred(ink: torch.Tensor) -> torch.Tensor:
    """As if it had been drawn at half its size."""
    small = functional.avg_pool2d(ink, 2)
    return functional.interpolate(small, size=ink.shape[-2:], mode="bilinear", align_corners=False)


def _batches(
    rows: npt.NDArray[np.int64], labels: Labels, config: TrainJudgeConfig, fold: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Numbers of pictures for each step: an attribute by chance, a class of it with the square root of how frequent it is
    (Mahajan et al. 2018), a picture of that class by chance. So what is rare is seen as well."""
    weights = np.zeros(len(rows))
    for column in labels.T:
        known = column != UNKNOWN
        _, classes, counts = np.unique(column[known], return_inverse=True, return_counts=True)
        weights[known] += 1 / (np.sqrt(counts).sum() * np.sqrt(counts)[classes])
    random = np.random.default_rng([config.seed, fold])
    for _ in range(config.steps):
        yield rows[random.choice(len(rows), config.batch_size, p=weights / weights.sum())]


def _loss(logits: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    losses = [
        functional.cross_entropy(of_attribute, column, ignore_index=UNKNOWN, reduction="sum")
        for of_attribute, column in zip(logits, labels.unbind(1), strict=True)
    ]
    return torch.stack(losses).sum() / len(labels)
