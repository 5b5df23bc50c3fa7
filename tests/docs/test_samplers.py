"""examples/add_a_sampler.py: consistency sampling, checked where the one-step network has a closed form."""

from __future__ import annotations

import pytest
import torch
from examples.add_a_sampler import ConsistencySampling, with_consistency
from tests.support.bundles import save_tiny_bundle
from tests.support.gaussian import MEAN, STD, Labels, as_prediction, process_of, rowwise, streams

from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.samplers import MixedSampling, SamplingConfig
from unclip.pipelines.pipeline import Pipeline

SAMPLES = 20_000


class ConsistencyFunction:
    """The network that distillation would end with for data N(mean, STD^2): the end of the probability flow from x_t.

    The flow keeps (x_t - sqrt(abar) mean) / sqrt(abar STD^2 + 1 - abar).
    """

    def __init__(self, process: DiffusionProcess) -> None:
        self.process = process

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        mean = rowwise(cond.values, x_t)
        clean = mean + STD * (x_t - abar.sqrt() * mean) / (abar * STD**2 + 1 - abar).sqrt()
        return as_prediction(self.process, clean, x_t, timesteps)


def drawn(sampling: MixedSampling, process: DiffusionProcess) -> torch.Tensor:
    count = len(sampling.configs)
    x_T = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = Labels(torch.full((count,), MEAN, dtype=torch.float64))
    return sampling.sample(ConsistencyFunction(process), x_T, process, streams(count), cond)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_samples_have_the_distribution_of_the_data(steps: int, prediction_type: str) -> None:
    """With any number of steps, where ancestral sampling with the same network, whose x_start is no mean, has not."""
    process = process_of(prediction_type=prediction_type)
    config = ConsistencySampling(num_inference_steps=steps, timestep_spacing="trailing")
    x = drawn(MixedSampling([config] * SAMPLES), process)
    error = STD / SAMPLES**0.5
    assert abs(float(x.mean()) - MEAN) < 4 * error
    assert abs(float(x.std()) - STD) < 4 * error
    others = drawn(MixedSampling([SamplingConfig(num_inference_steps=4)] * SAMPLES), process)
    assert abs(float(others.std()) - STD) > 10 * error


def test_a_row_beside_rows_of_other_samplers_comes_out_as_alone() -> None:
    process = process_of(prediction_type="sample")
    mine = ConsistencySampling(num_inference_steps=4)
    others = [SamplingConfig(sampler="ddim", num_inference_steps=3), SamplingConfig(num_inference_steps=5)]
    alone = drawn(MixedSampling([mine] * 3), process)
    mixed = drawn(MixedSampling([mine, *others]), process)
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(mixed[1:], alone[1:])


def test_a_pipeline_draws_with_it(tmp_path) -> None:
    save_tiny_bundle(str(tmp_path))
    stored = Pipeline.from_bundle(str(tmp_path), "cpu")
    pictures = stored(["a red heart"], seeds=[3]).images[16]
    consistent = with_consistency(stored, num_inference_steps=2)
    assert consistent.decoder.config.sampling.sampler == "consistency"
    again = consistent(["a red heart"], seeds=[3]).images[16]
    assert again.shape == pictures.shape
    assert (again != pictures).any()
