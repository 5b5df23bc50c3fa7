"""The contrastive loss over several processes against one process with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import run_ranks
from torch.nn import functional

from unclip.training.objectives.contrastive import contrastive_loss

PAIRS, WIDTH, MICROBATCHES = 8, 5, 2
SCALE = 7.0


class Towers(torch.nn.Module):
    """Two linear maps and a scale: the least that has a gradient of its own on both sides."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.picture, self.caption = (
            torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64)) for _ in range(2)
        )
        self.scale = torch.nn.Parameter(torch.tensor(SCALE, dtype=torch.float64))

    def forward(self, picture: torch.Tensor, caption: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image, text = picture @ self.picture, caption @ self.caption
        return functional.normalize(image, dim=1), functional.normalize(text, dim=1), self.scale


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and captions of all micro-batches: (MICROBATCHES, PAIRS, WIDTH)."""
    random = torch.Generator().manual_seed(1)
    pictures, captions = (
        torch.randn(MICROBATCHES, PAIRS, WIDTH, generator=random, dtype=torch.float64) for _ in range(2)
    )
    return pictures, captions


def one_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The loss, and the gradients averaged over the workers, as DeepSpeed does, of its share of each micro-batch."""
    model, share = Towers(), PAIRS // world_size
    losses = []
    for pictures, captions in zip(*inputs(), strict=True):
        rows = slice(rank * share, (rank + 1) * share)
        loss = contrastive_loss(model(pictures[rows], captions[rows])).loss
        (loss / MICROBATCHES).backward()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    answer: dict[str, Any] = {"loss": float(mean) / world_size}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        answer[name] = (parameter.grad / world_size).tolist()
    return answer


def whole_batch() -> dict[str, Any]:
    """One process, every micro-batch at once, written out: pairs are told from those of their own micro-batch."""
    model = Towers()
    total = torch.zeros((), dtype=torch.float64)
    for pictures, captions in zip(*inputs(), strict=True):
        image, text, scale = model(pictures, captions)
        logits = scale * image @ text.T
        right = logits.diagonal()
        total = total - (right - logits.logsumexp(dim=1)).mean() / 2 - (right - logits.logsumexp(dim=0)).mean() / 2
    loss = total / MICROBATCHES
    loss.backward()
    return {"loss": float(loss.detach())} | {
        name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_have_the_loss_and_the_gradients_of_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    answers = run_ranks(one_rank, world_size, tmp_path)
    expected = json.loads(json.dumps(whole_batch()))
    assert len(answers) == world_size
    for answer in answers:
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(answer[name]), torch.tensor(value), rtol=1e-6, atol=1e-9)
