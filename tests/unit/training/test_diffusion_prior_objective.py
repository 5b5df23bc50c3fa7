"""What the diffusion prior learns, by formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.objectives import Recorded, Zero, build, depends, make_batch, noised, prior, streams


def test_the_prior_learns_the_normalised_embedding_itself() -> None:
    objective, batch = build(prior()), make_batch(7)
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    z = (batch["image_embed"].float() - 0.1) / 0.25
    x_t, _, timesteps = noised(z, batch)
    torch.testing.assert_close(network.x_t, x_t)
    assert torch.equal(network.timesteps, timesteps)
    torch.testing.assert_close(network.cond.text_embed, batch["text_embed"].float())
    assert network.cond.text_mask.tolist() == [[True] * 4 + [False]] * 7
    torch.testing.assert_close(output.loss, ((network.output - z) ** 2).mean())
    torch.testing.assert_close(output.metrics["mse"], output.loss.detach())
    assert not output.metrics["mse"].requires_grad


@pytest.mark.parametrize("changed", ["tokens", "text_embed"])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_prior_without_text_does_not_depend_on_it(changed: str, drop: float) -> None:
    assert depends(prior(text_drop_prob=drop), changed) == (drop == 0.0)


def test_the_prior_sees_the_noised_embedding_even_without_text() -> None:
    assert depends(prior(text_drop_prob=1.0), "image_embed")


def test_the_prior_drops_text_at_its_rate() -> None:
    count = 20_000
    objective, batch = build(prior()), make_batch(count)
    batch["position"] = torch.arange(count)
    network = Recorded(Zero())
    objective.loss(network, batch, streams(batch))
    assert float(network.cond.text_dropped.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / count))
