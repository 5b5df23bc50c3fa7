"""CLIP's loss against open_clip's and plain autograd."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from tests.support.objectives import Batch, build, streams
from torch import nn

from unclip.recipes.clip import tiny_architecture
from unclip.training.objectives.clip import ClipObjectiveConfig


def clip_batch(count: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 400, (count, 16), generator=random, dtype=torch.int32)
    tokens[:, -1] = 49407
    image = torch.randint(256, (count, 32, 32, 3), generator=random, dtype=torch.uint8)
    return {"position": torch.arange(count), "image": image, "tokens": tokens}


def open_clip_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = open_clip.ClipLoss()(*model(batch["image"], batch["tokens"]))
    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_contrastive_loss_is_open_clips() -> None:
    objective, batch = build(ClipObjectiveConfig(architecture=tiny_architecture())), clip_batch(6)
    reference = copy.deepcopy(objective.model)
    output = objective.loss(objective.model, batch, streams(batch))
    output.loss.backward()
    expected = open_clip_loss(reference, batch)
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = gradients(objective.model), gradients(reference)
    assert ours.keys() == theirs.keys() == dict(objective.model.named_parameters()).keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)
    image, text, scale = objective.model(batch["image"], batch["tokens"])
    found = (image @ text.T).argmax(dim=1) == torch.arange(6)
    assert float(output.metrics["accuracy"]) == pytest.approx(float(found.float().mean()))
    torch.testing.assert_close(output.metrics["logit_scale"], scale.detach())


def test_sharpness_aware_minimisation_takes_the_gradient_uphill_and_comes_back() -> None:
    rho = 0.3
    config = ClipObjectiveConfig(architecture=tiny_architecture(), sam_rho=rho)
    objective, batch = build(config), clip_batch(6)
    before = {name: parameter.detach().clone() for name, parameter in objective.model.named_parameters()}
    uphill = copy.deepcopy(objective.model)
    open_clip_loss(uphill, batch).backward()
    first = gradients(uphill)
    norm = torch.cat([gradient.flatten() for gradient in first.values()]).norm()
    with torch.no_grad():
        for name, parameter in uphill.named_parameters():
            parameter.add_(rho * first[name] / norm)
    uphill.zero_grad()
    expected = open_clip_loss(uphill, batch)
    expected.backward()

    output = objective.loss(objective.model, batch, streams(batch))
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    ours = gradients(objective.model)
    for name, gradient in gradients(uphill).items():  # by norm: single elements near zero are all rounding
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert any(not torch.allclose(ours[name], first[name], rtol=0.05) for name in first)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in objective.model.named_parameters()]).norm()
    assert float(moved) == pytest.approx(rho, rel=1e-4)
    objective.after_backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in objective.model.named_parameters())
