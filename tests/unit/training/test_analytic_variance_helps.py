"""What the measured variance is good for: few steps end nearer to the data, and the bound on its likelihood is tighter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.support.gaussian import CorrelatedDenoiser, moments, process_of, streams
from torch.nn import functional

from unclip.diffusion.likelihood import bits_per_dimension
from unclip.diffusion.losses import variational_term
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.respacing import sampling_timesteps, step_pairs
from unclip.diffusion.samplers import DDPM
from unclip.models.prior import PriorCondition, PriorModel
from unclip.pipelines.stages import PriorStageConfig
from unclip.training.analytic_variance import noise_error
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.utils.random import SampleGenerator

FIXED = ("fixed_small", "fixed_large")


def with_measured_variance(
    process: DiffusionProcess, denoise: Any, x_start: torch.Tensor, cond: Any, generator: SampleGenerator
) -> DiffusionProcess:
    """The process with what a fit measures of the network on `x_start`."""
    with torch.no_grad():
        table = noise_error(denoise, x_start, cond, process=process, generator=generator)
    return process.config.merged(
        {
            "variance_type": "analytic",
            "analytic_noise_error": table.tolist(),
            "analytic_variance_bound": float(x_start.square().mean()),
        }
    ).build()


# --- Gaussian data, exact network -------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.08, 0.0], [0.08, 0.16, 0.05], [0.0, 0.05, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_few_steps_end_nearer_to_the_datas_covariance(steps: int) -> None:
    """Exact moments of ancestral samples; one variance for all directions, where the exact one differs between them."""
    generator = streams(400)
    x_start = MEAN + generator.child("data").normal((3,)).double() @ torch.linalg.cholesky(COVARIANCE).T
    process = process_of(prediction_type="sample")
    denoise = CorrelatedDenoiser(process, MEAN, COVARIANCE)
    analytic = with_measured_variance(process, denoise, x_start, None, generator)
    pairs = step_pairs(sampling_timesteps(1000, steps, "linspace"), 1000)

    def error(process: DiffusionProcess) -> float:
        mean, covariance = moments(DDPM(), process, denoise, pairs, dim=3)
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.01)
        return float((covariance - COVARIANCE).norm())

    found = error(analytic)
    for variance_type in FIXED:
        assert found < 0.5 * error(process_of(prediction_type="sample", variance_type=variance_type)), variance_type


def test_few_steps_cost_fewer_bits() -> None:
    """All are upper bounds of the entropy, in bins of 8-bit pixels; the measured one comes nearest."""
    std, settings = 0.2, {"num_train_timesteps": 20}

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        abar = process_of(**settings).alphas_cumprod(timesteps)[:, None].to(x_t.dtype)
        return (1 - abar).sqrt() * x_t / (abar * std**2 + 1 - abar)

    generator = streams(64)
    x_start = (std * generator.child("data").normal((256,))).double()
    fitted = with_measured_variance(process_of(**settings), denoise, x_start[:32], None, streams(32))
    processes = {"analytic": fitted} | {name: process_of(variance_type=name, **settings) for name in FIXED}
    bits = {
        name: float(bits_per_dimension(denoise, x_start[32:], process, streams(32), None).total.mean())
        for name, process in processes.items()
    }
    entropy = (0.5 * math.log(2 * math.pi * math.e * std**2) - math.log(2 / 255)) / math.log(2)
    # Here the first timestep's own noise is all that is between bound and entropy.
    assert all(entropy - 0.02 < bound for bound in bits.values())
    assert all(bits["analytic"] - entropy < 0.5 * (bits[name] - entropy) for name in FIXED), (bits, entropy)


# --- a trained prior --------------------------------------------------------------------------------------------------

D, LENGTH, END, T, STEPS = 8, 4, 19, 8, 300
STAGE = {
    "model": {"embed_dim": D, "context_length": LENGTH, "width": 32, "depth": 2, "heads": 2, "vocab_size": END + 1},
    "diffusion": {"num_train_timesteps": T, "prediction_type": "sample", "clip_sample_range": 5.0},
    "sampling": {"num_inference_steps": 4},
    "normalizer": {"std": 1 / (17.2 * math.sqrt(D / 1024))},
}


def embedded(count: int, first: int) -> dict[str, torch.Tensor]:
    """Captions whose text embedding says half of what there is to say about the image embedding."""
    position = torch.arange(first, first + count)
    random = SampleGenerator.for_samples(1, position)
    text = random.normal((D,))
    tokens = torch.full((count, LENGTH), END, dtype=torch.int32)
    return {
        "position": position,
        "tokens": tokens,
        "text_embed": functional.normalize(text, dim=1),
        "image_embed": functional.normalize(text + random.normal((D,)), dim=1),
    }


@pytest.fixture(scope="module")
def trained() -> PriorModel:
    """A few seconds of training on pairs that are new in every step."""
    torch.manual_seed(0)
    objective = PriorObjectiveConfig(stage=PriorStageConfig.from_dict(STAGE)).build()
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        batch = embedded(64, 64 * step)
        optimizer.zero_grad()
        objective.loss(objective.model, batch, SampleGenerator.for_samples(0, batch["position"])).loss.backward()
        optimizer.step()
        schedule.step()
    assert isinstance(objective.model, PriorModel)
    return objective.model.eval()


@torch.no_grad()
def bits(process: DiffusionProcess, model: PriorModel, batch: dict[str, torch.Tensor], x_start: torch.Tensor) -> float:
    """The terms of the bound per dimension that the reverse variances are in: all but that of 8-bit pixels at t = 0."""
    cond = PriorCondition.of_captions(batch["text_embed"], batch["tokens"])
    generator, total = SampleGenerator.for_samples(2, batch["position"]), 0.0
    for timestep in range(1, T):
        timesteps = torch.full((len(x_start),), timestep)
        x_t = process.q_sample(x_start, timesteps, generator.normal((D,)))
        pred_x_start = process.pred_x_start(model(x_t, timesteps, cond), x_t, timesteps)
        terms = variational_term(process, pred_x_start, None, x_start=x_start, x_t=x_t, timesteps=timesteps)
        total += float(terms.mean())
    return total


def test_a_trained_prior_explains_new_embeddings_in_fewer_bits(trained: PriorModel) -> None:
    """Few timesteps, so that even the least noisy one is learned in seconds: Gamma is that of a network that knows
    E[noise | x_t], and where one does not yet, analytic variance is no better than fixed_small."""
    stage = PriorStageConfig.from_dict(STAGE)
    normalizer = stage.normalizer.build()
    seen, new = embedded(512, 0), embedded(512, 10**6)
    cond = PriorCondition.of_captions(seen["text_embed"], seen["tokens"])
    x_start = normalizer.normalize(seen["image_embed"])
    streams_seen = SampleGenerator.for_samples(3, seen["position"])
    fitted = with_measured_variance(stage.diffusion.build(), trained, x_start, cond, streams_seen)
    x_new = normalizer.normalize(new["image_embed"])
    found = bits(fitted, trained, new, x_new)
    for variance_type in FIXED:
        config: DiffusionConfig = stage.diffusion.merged({"variance_type": variance_type})
        assert found < bits(config.build(), trained, new, x_new) - 0.05, variance_type
