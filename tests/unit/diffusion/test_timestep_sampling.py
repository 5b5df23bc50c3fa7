"""Draws of timesteps against a plain re-telling of the rule, and against the uniform mean that they must estimate."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch

from unclip.diffusion.timestep_sampling import LossAwareTimesteps, uniform_timesteps
from unclip.utils.random import SampleGenerator

T = 7


def streams(count: int, seed: int = 0) -> SampleGenerator:
    return SampleGenerator.for_samples(seed, torch.arange(count))


def observations(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps, some often and some seldom, and losses that grow with them over orders of magnitude."""
    random = np.random.default_rng(seed)
    timesteps = random.choice(T, size=count, p=[0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05])
    losses = 4.0**timesteps * random.uniform(0.5, 2, size=count)
    return torch.from_numpy(timesteps), torch.from_numpy(losses).float()


def warm() -> LossAwareTimesteps:
    history = LossAwareTimesteps(T)
    history.observe(*observations(1000))
    return history


def told(timesteps: torch.Tensor, losses: torch.Tensor) -> list[float]:
    """Improved DDPM section 3.3 loss by loss, with the uniform share of guided-diffusion."""
    last = [deque(maxlen=10) for _ in range(T)]
    for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
        last[timestep].append(loss)
    if any(len(losses) < 10 for losses in last):
        return [1 / T] * T
    magnitudes = [(sum(loss**2 for loss in losses) / 10) ** 0.5 for losses in last]
    return [0.999 * magnitude / sum(magnitudes) + 0.001 / T for magnitude in magnitudes]


@pytest.mark.parametrize("batch", [1, 3, 64, 1000])
def test_probabilities_follow_the_last_ten_losses(batch: int) -> None:
    """However many come at once, in the order in which they come; a batch of 1000 has far more than ten of a timestep."""
    timesteps, losses = observations(1000)
    history = LossAwareTimesteps(T)
    warm_at = []
    for first in range(0, 1000, batch):
        history.observe(timesteps[first : first + batch], losses[first : first + batch])
        expected = told(timesteps[: first + batch], losses[: first + batch])
        assert history.probabilities().tolist() == pytest.approx(expected, rel=1e-12)
        warm_at.append(expected != [1 / T] * T)
    assert warm_at[-1]
    assert batch > 64 or not warm_at[0]


def test_draws_have_their_probabilities() -> None:
    count = 200_000
    history = warm()
    timesteps, weights = history.draw(streams(count))
    expected = history.probabilities()
    share = torch.bincount(timesteps, minlength=T) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((share - expected).abs() < 4 * deviation).all()
    assert expected.max() / expected.min() > 500
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), 1 / (T * expected[timesteps]), rtol=1e-6, atol=0)


def test_weighted_means_are_those_of_uniform_draws_with_less_noise() -> None:
    count = 200_000
    loss = torch.tensor([4.0**t for t in range(T)])
    timesteps, weights = warm().draw(streams(count))
    drawn = weights * loss[timesteps]
    assert abs(drawn.mean() - loss.mean()) < 4 * drawn.std() / count**0.5
    evenly, ones = uniform_timesteps(T, streams(count))
    assert torch.equal(ones, torch.ones(count))
    assert drawn.std() < 0.5 * loss[evenly].std()


def test_draws_are_uniform_until_all_timesteps_are_known() -> None:
    history = LossAwareTimesteps(T)
    timesteps, losses = torch.arange(T).repeat(10)[:-1], torch.arange(1.0, 10 * T)
    history.observe(timesteps, losses)
    drawn, weights = history.draw(streams(70_000))
    assert torch.equal(weights, torch.ones(70_000))
    assert (torch.bincount(drawn) / 70_000 - 1 / T).abs().max() < 4 * (1 / T / 70_000) ** 0.5
    history.observe(torch.tensor([T - 1]), torch.tensor([1e6]))
    assert history.probabilities()[T - 1] > 0.9


def test_a_process_that_has_no_loss_left_is_drawn_from_evenly() -> None:
    history = LossAwareTimesteps(T)
    history.observe(torch.arange(T).repeat(10), torch.zeros(10 * T))
    assert history.probabilities().tolist() == [1 / T] * T


def test_uniform_draws_are_the_streams_integers() -> None:
    timesteps, weights = uniform_timesteps(T, streams(50))
    assert torch.equal(timesteps, streams(50).integers(T))
    assert torch.equal(weights, torch.ones(50))


def test_a_sample_is_drawn_by_itself() -> None:
    history = warm()
    whole = history.draw(streams(40))
    for row in (0, 17, 39):
        alone = history.draw(SampleGenerator.for_samples(0, torch.tensor([row])))
        assert [float(value) for value in alone] == [float(values[row]) for values in whole]


def test_losses_that_are_not_finite_are_passed_over() -> None:
    history, other = warm(), warm()
    timesteps, losses = observations(50, seed=1)
    other.observe(timesteps, losses)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    history.observe(torch.cat([torch.tensor([0, 5, 6]), timesteps]), torch.cat([bad, losses]))
    assert torch.equal(history.probabilities(), other.probabilities())


def test_the_state_goes_on_where_it_was_stored() -> None:
    history = warm()
    stored = history.state()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "losses": (torch.float32, (T, 10)),
        "losses_seen": (torch.int64, (T,)),
    }
    other = LossAwareTimesteps(T)
    other.load_state(stored)
    for seed in (1, 2):
        for each in (history, other):
            each.observe(*observations(30, seed=seed))
        assert torch.equal(history.probabilities(), other.probabilities())
    assert not torch.equal(stored["losses"], history.state()["losses"])  # what was stored is a copy
    with pytest.raises(ValueError, match="state is of 7 timesteps, not 8"):
        LossAwareTimesteps(8).load_state(stored)
