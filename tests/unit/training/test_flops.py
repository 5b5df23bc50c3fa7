"""FLOPs counted on fake tensors are those of a real step, without what is computed again."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.dry_step import empty_batch
from unclip.training.flops import training_flops, with_checkpointing
from unclip.utils.random import SampleGenerator


def _counted(config: TrainConfig, samples: int) -> float:
    objective = config.objective.build()
    batch = empty_batch(config, samples)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        objective.loss(objective.model, batch, SampleGenerator.for_samples(0, batch["position"])).loss.backward()
    return counter.get_total_flops() / samples


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler_256"])
def test_flops_are_those_of_a_real_step(stage: str) -> None:
    config = RECIPES[stage]["debug"]()
    assert training_flops(config) == pytest.approx(_counted(config, 2), rel=1e-9)


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [(stage, name) for stage, recipes in RECIPES.items() for name in recipes if name.endswith("debug")],
)
def test_every_kind_of_run_can_be_counted(stage: StageName, recipe: str) -> None:
    """Worker 0 counts at the start of each run."""
    assert training_flops(RECIPES[stage][recipe]()) > 0


def test_a_run_with_loss_aware_draws_can_be_counted() -> None:
    config = RECIPES["decoder"]["debug"]()
    aware = config.merged({"objective": {"loss": {"timestep_sampling": "loss_aware"}}})
    assert training_flops(aware) == training_flops(config)


def test_recomputation_is_not_counted() -> None:
    config = RECIPES["prior"]["debug"]()
    checkpointed = with_checkpointing(config, enabled=True)
    assert checkpointed != config
    assert _counted(checkpointed, 2) > 1.1 * _counted(config, 2)
    assert training_flops(checkpointed) == training_flops(config)


def test_the_ascent_of_sharpness_aware_minimisation_is_counted() -> None:
    config = RECIPES["clip"]["debug"]().merged({"objective": {"sam_rho": 0.0}})
    twice = config.merged({"objective": {"sam_rho": 0.1}})
    assert training_flops(twice) == pytest.approx(2 * training_flops(config), rel=0.01)


def test_billions_of_parameters_take_no_memory() -> None:
    # 2 * 3 * parameters * positions is a lower bound of a transformer; the paper's prior has 1.3 G of them, 260 positions.
    assert 6 * 1.2e9 * 256 < training_flops(RECIPES["prior"]["paper"]()) < 6 * 1.6e9 * 260
