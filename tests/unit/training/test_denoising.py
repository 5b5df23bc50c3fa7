"""The loss that all diffusion stages share: what it draws, weighs, learns from and refuses."""

from __future__ import annotations

import sys
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from unclip.diffusion.losses import DiffusionLossConfig
from unclip.diffusion.process import DiffusionConfig
from unclip.training.objectives import ObjectiveConfig
from unclip.training.objectives.base import BaseObjectiveConfig, DenoisingLoss, DiffusionObjective
from unclip.utils.random import SampleGenerator

T = 8
VELOCITY = {"num_train_timesteps": T, "prediction_type": "v_prediction"}


class Scaled(nn.Module):
    """Answers its input times a number that it learns; the condition is not looked at."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))
        self.repeat = repeat

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return (self.scale * x_t).repeat(1, self.repeat)


def streams(count: int, first: int = 0) -> SampleGenerator:
    return SampleGenerator.for_samples(0, torch.arange(first, first + count))


def loss_aware(diffusion: dict[str, Any] = VELOCITY, **settings: Any) -> DenoisingLoss:
    config = DiffusionLossConfig(timestep_sampling="loss_aware", **settings)
    return DenoisingLoss(DiffusionConfig.from_dict(diffusion).build(), config)


def warmed(denoising: DenoisingLoss, losses: list[float]) -> DenoisingLoss:
    """That has seen ten of each of these losses, one a timestep."""
    denoising.observe({"timestep": torch.arange(T).repeat(10), "loss": torch.tensor(losses).repeat(10)})
    return denoising


def test_loss_aware_draws_leave_loss_and_metrics_unbiased() -> None:
    """With the answer 0 the squared error of v at timestep t is abar + (1 - abar) x^2 in the mean."""
    count, x = 60_000, 3.0
    denoising = warmed(loss_aware(), [float(t + 1) for t in range(T)])
    abar = denoising.process.alphas_cumprod(torch.arange(T))
    exact = float((abar + (1 - abar) * x**2).mean())
    output = denoising(Scaled(), torch.full((count, 2), x), None, streams(count))
    # v has a deviation of at most 2 sqrt(abar (1 - abar)) x + sqrt(2) abar about it, and weights are at most 4.5.
    tolerance = 4 * 4.5 * (x + 2 + exact) / count**0.5
    assert tolerance < 0.2 * exact
    assert output.loss.item() == pytest.approx(exact, abs=tolerance)
    assert float(output.metrics["mse"]) == pytest.approx(output.loss.item(), rel=1e-6)
    drawn = denoising.observations()["timestep"].double().mean()
    assert drawn > (T - 1) / 2 + 0.5  # late timesteps were said to have large losses


def test_what_is_observed_are_the_samples_own_losses_in_order() -> None:
    denoising, network = warmed(loss_aware(), [1.0] * T), Scaled()
    x_start = torch.linspace(-1, 1, 12).reshape(6, 2)
    outputs = [denoising(network, x_start[rows], None, streams(3, rows.start)) for rows in (slice(0, 3), slice(3, 6))]
    seen = denoising.observations()
    assert seen["timestep"].shape == seen["loss"].shape == (6,)
    assert not seen["loss"].requires_grad
    # All timesteps have had the same losses: the weights are 1.
    torch.testing.assert_close(seen["loss"].reshape(2, 3).mean(dim=1), torch.stack([o.loss for o in outputs]).detach())
    for row in range(6):
        denoising(network, x_start[row : row + 1], None, streams(1, row))
        alone = denoising.observations()
        assert int(alone["timestep"]) == int(seen["timestep"][row])
        torch.testing.assert_close(alone["loss"], seen["loss"][row : row + 1])
    assert denoising.observations() == {}


def test_an_evaluation_teaches_nothing() -> None:
    denoising = loss_aware()
    with torch.no_grad():
        denoising(Scaled(), torch.ones(3, 2), None, streams(3))
    assert denoising.observations() == {}


def test_uniform_draws_have_no_state() -> None:
    denoising = DenoisingLoss(DiffusionConfig.from_dict(VELOCITY).build(), DiffusionLossConfig())
    denoising(Scaled(), torch.ones(3, 2), None, streams(3))
    assert denoising.observations() == denoising.state() == {}


def test_state_makes_another_objective_draw_alike() -> None:
    taught, other = warmed(loss_aware(), [10.0**t for t in range(T)]), loss_aware()
    x_start = torch.ones(50, 2)
    before = other(Scaled(), x_start, None, streams(50)).loss.item()
    other.load_state(taught.state())
    losses = [denoising(Scaled(), x_start, None, streams(50)).loss.item() for denoising in (taught, other)]
    assert losses[0] == losses[1] != before


@pytest.mark.parametrize("kind", ["hybrid", "vlb"])
def test_the_pure_bound_trains_the_mean_and_the_hybrid_loss_by_its_squared_error(kind: str) -> None:
    diffusion = {"num_train_timesteps": T, "variance_type": "learned_range"}
    denoising = DenoisingLoss(DiffusionConfig.from_dict(diffusion).build(), DiffusionLossConfig(kind=kind))
    network = Scaled(repeat=2)
    output = denoising(network, torch.linspace(-1, 1, 30).reshape(10, 3), None, streams(10))
    output.loss.backward()
    assert network.scale.grad is not None
    assert network.scale.grad.abs() > 0
    metrics = {name: float(value) for name, value in output.metrics.items()}
    expected = {"hybrid": metrics["mse"] + metrics["vlb"] * T / 1000, "vlb": metrics["vlb"] * T}[kind]
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_does_not_suit_the_process_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="kind vlb needs variance_type learned_range, not fixed_small"):
        loss_aware(VELOCITY, kind="vlb")


@pytest.mark.parametrize("config", get_args(ObjectiveConfig))
def test_every_stage_with_this_loss_hands_its_state_to_the_loop(config: type[BaseObjectiveConfig]) -> None:
    """A plain `Objective` has no state: loss-aware draws would then never learn anything, and nobody would notice."""
    built = get_type_hints(config.build, vars(sys.modules[config.__module__]))["return"]
    assert issubclass(built, DiffusionObjective) == ("loss" in config.model_fields)
