"""How fast errors fall: order of the solvers on the probability flow of Gaussian data, and DDIM's inversion.

The flow keeps (x_t - sqrt(abar) mean) / deviation, deviation^2 being abar STD^2 + 1 - abar.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.gaussian import MEAN, STD, GaussianDenoiser, Labels, process_of, streams

from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps
from unclip.diffusion.samplers import DDIM, DPMSolverPP, SamplerState, SamplingConfig, ddim_invert

PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def along_the_flow(process: DiffusionProcess, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    abar, abar_end = process.alphas_cumprod(torch.tensor([start, end]))
    deviation, deviation_end = ((a * STD**2 + 1 - a).sqrt() for a in (abar, abar_end))
    return abar_end.sqrt() * MEAN + deviation_end * (x - abar.sqrt() * MEAN) / deviation


def even_in_lambda(process: DiffusionProcess, steps: int) -> list[int]:
    """Timesteps at even distances of log(alpha / sigma), from -2.5 to 2."""
    abar = process.alphas_cumprod(torch.arange(process.num_train_timesteps))
    table = 0.5 * (abar / (1 - abar)).log()
    grid = torch.linspace(-2.5, 2.0, steps + 1, dtype=torch.float64)
    return [int((table - value).abs().argmin()) for value in grid]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "order"), [(DDIM(), 1), (DPMSolverPP(), 2)], ids=["ddim is first order", "dpm-solver++ is second order"]
)
def test_the_order_of_the_solvers(sampler, order, prediction_type) -> None:
    """Doubling the steps divides the error by 2^order."""
    # So many training steps that rounding to one of them does not disturb the spacing.
    process = process_of(beta_schedule="linear", num_train_timesteps=100_000, prediction_type=prediction_type)
    denoise = GaussianDenoiser(process)
    errors = []
    for steps in (40, 80, 160, 320):
        timesteps = even_in_lambda(process, steps)
        x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        state = SamplerState.start(x_T)
        for now, before in itertools.pairwise(timesteps):
            t, s = torch.full((9,), now), torch.full((9,), before)
            state = sampler.step(process, denoise(state.x_t, t, None), state, t, s, None)
        exact = along_the_flow(process, x_T, timesteps[0], timesteps[-1])
        errors.append(float((state.x_t - exact).abs().max()))
    slopes = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(0.8 * 2**order < slope < 1.25 * 2**order for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_approaches_the_probability_flow(schedule, prediction_type) -> None:
    """From x_T to the clean sample with the timesteps that a stage uses; the error halves when the steps double."""
    process = process_of(beta_schedule=schedule, prediction_type=prediction_type)
    x_T = torch.linspace(-3, 3, 50, dtype=torch.float64).reshape(50, 1)
    exact = along_the_flow(process, x_T, 999, -1)
    errors = []
    for steps in (50, 100, 200, 400):
        config = SamplingConfig(sampler="ddim", num_inference_steps=steps)
        samples = config.sample(GaussianDenoiser(process), x_T, process, streams(50), None)
        errors.append(float((samples - exact).abs().max()))
    assert errors[-1] < 0.02
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in itertools.pairwise(errors)), errors


def test_dpm_solver_needs_far_fewer_steps_than_ddim() -> None:
    process = process_of(prediction_type="v_prediction")
    x_T = torch.linspace(-3, 3, 50, dtype=torch.float64).reshape(50, 1)
    exact = along_the_flow(process, x_T, 999, -1)

    def error(sampler: str, steps: int) -> float:
        config = SamplingConfig(sampler=sampler, num_inference_steps=steps, timestep_spacing="trailing")
        samples = config.sample(GaussianDenoiser(process), x_T, process, streams(50), None)
        return float((samples - exact).abs().max())

    assert error("dpmsolver++", 20) < error("ddim", 50)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_inversion_finds_the_start_of_the_flow(schedule, prediction_type) -> None:
    """x_T of the clean sample by the closed form; the error falls with the steps."""
    process = process_of(beta_schedule=schedule, prediction_type=prediction_type)
    x_start = MEAN + STD * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = along_the_flow(process, x_start, -1, 999)
    errors = []
    for steps in (25, 50, 100, 200):
        timesteps = sampling_timesteps(1000, steps, "linspace")
        x_T = ddim_invert(GaussianDenoiser(process), x_start, timesteps, process, None)
        errors.append(float((x_T - exact).abs().max()))
    assert all(fine < coarse / 1.5 for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.05, errors


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_inversion_and_then_sampling_reconstructs(spacing) -> None:
    """With each sample's own condition, and up to an error of first order: four times the steps, a quarter of it."""
    process = process_of(beta_schedule="squaredcos_cap_v2")
    denoise, labels = GaussianDenoiser(process), Labels(torch.tensor([0.5, -0.2, 0.0], dtype=torch.float64))
    spread = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_start = labels.values[:, None] + STD * spread
    errors = []
    for steps in (20, 80, 320):
        config = SamplingConfig(sampler="ddim", num_inference_steps=steps, timestep_spacing=spacing)
        x_T = ddim_invert(denoise, x_start, config.timesteps(1000), process, labels)
        again = config.sample(denoise, x_T, process, streams(3), labels)
        errors.append(float((again - x_start).abs().max()))
    assert all(3 < coarse / fine < 5 for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.02, errors


def test_inversion_reads_the_network_at_the_level_of_its_input() -> None:
    process, told = process_of(), []

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        told.append(timesteps.tolist())
        return torch.zeros_like(x_t).bfloat16()

    x_start = torch.ones(2, 3, requires_grad=True)
    x_T = ddim_invert(denoise, x_start, [999, 400, 30], process, None)
    assert told == [[30, 30], [30, 30], [400, 400]]
    assert x_T.dtype == torch.float32
    assert not x_T.requires_grad
    # No noise anywhere: the clean sample is only scaled.
    torch.testing.assert_close(x_T, process.q_sample(torch.ones(2, 3), torch.tensor([999, 999]), torch.zeros(2, 3)))


def test_inversion_refuses_a_list_that_ascends() -> None:
    with pytest.raises(ValueError, match=r"strictly descending and in 0\.\.999, not \[0, 999\]"):
        ddim_invert(GaussianDenoiser(process_of()), torch.zeros(1, 2), [0, 999], process_of(), None)
