"""The networks and objectives of the debug recipes under the engine: in bfloat16, and with recomputed activations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unclip.config.base import Config
from unclip.data.pca import PrincipalComponents
from unclip.recipes import RECIPES
from unclip.training import zero_state
from unclip.training.config import TrainConfig
from unclip.training.dry_step import empty_batch
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.utils.random import SampleGenerator

DEBUG = [(stage, name) for stage, recipes in RECIPES.items() for name in recipes if "debug" in name]
STEPS, RATE = 3, 1e-3
Losses = list[tuple[float, float]]
"""Loss and norm of the gradient at each step."""


@pytest.fixture(params=DEBUG, ids=lambda param: "-".join(param))
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TrainConfig:
    stage, name = request.param
    config: TrainConfig = RECIPES[stage][name]()
    objective = config.objective
    if isinstance(objective, ClassifierObjectiveConfig):
        objective = objective.with_classes(("cat", "dog", "owl"))
    if isinstance(objective, ARPriorObjectiveConfig):
        width = objective.stage.model.embed_dim
        file = str(tmp_path / "pca.safetensors")
        PrincipalComponents(np.zeros(width), np.eye(width), np.ones(width), float(width), clip="").save(file)
        objective = objective.merged({"pca": file})
    return config.model_copy(update={"objective": objective})


def batch_of(config: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    batch = empty_batch(config, 4)
    batch["position"] = torch.arange(4) + 4 * step
    for name, tensor in batch.items():
        if name in ("image", "low_res"):
            tensor.random_(0, 256, generator=generator)
        elif name == "tokens":
            tensor[:, :6].random_(1, 400, generator=generator)
            tensor[:, 6] = 49407  # the end of a caption
        elif name == "label":
            tensor.random_(0, 3, generator=generator)
        elif tensor.is_floating_point():
            tensor.copy_(torch.nn.functional.normalize(torch.randn(tensor.shape, generator=generator), dim=-1))
    return batch


def train(config: TrainConfig, zero: ZeroConfig) -> tuple[Losses, Engine]:
    torch.manual_seed(0)
    objective = config.objective.build()
    optimizer = config.optimizer.model_copy(update={"warmup_steps": 0})
    device = torch.device("cpu")
    engine = Engine(objective.model, optimizer, zero, microbatch_size=4, accumulation_steps=1, device=device)
    losses = []
    for step in range(STEPS):
        batch = batch_of(config, step)
        torch.manual_seed(step)
        generator = SampleGenerator.for_samples(1, batch["position"])
        output = engine.forward(partial(objective.loss, engine.module, batch, generator))
        engine.backward(output.loss)
        objective.after_backward()
        losses.append((float(output.loss.detach()), engine.step(RATE)))
    return losses, engine


def test_bf16_trains_like_fp32(config: TrainConfig) -> None:
    """Losses within 1% and gradients within 5%, which is what 8 bits leave of sums as short as these."""
    expected, _ = train(config, ZeroConfig(stage=1, precision="fp32"))
    found, engine = train(config, ZeroConfig(stage=2, precision="bf16"))
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}
    for (loss, norm), (true_loss, true_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=0.01)
        assert norm == pytest.approx(true_norm, rel=0.05)


def recomputing(settings: Any) -> Any:
    """The same settings with `activation_checkpointing` wherever there is such a field; counts them."""
    if not isinstance(settings, Config):
        return settings
    changes = {name: recomputing(getattr(settings, name)) for name in type(settings).model_fields}
    if "activation_checkpointing" in changes:
        changes["activation_checkpointing"] = True
    return settings.model_copy(update=changes)


def test_recomputed_activations_change_nothing(config: TrainConfig) -> None:
    """Down to the last bit, with sharded weights, which the second forward pass has to gather again."""
    zero = ZeroConfig(stage=3, precision="fp32")
    kept, engine = train(config, zero)
    changed = recomputing(config)
    assert changed.objective != config.objective
    again, other = train(changed, zero)
    assert again == kept
    for one, two in zip(zero_state.fragments(engine), zero_state.fragments(other), strict=True):
        assert all(torch.equal(one.tensors[kind], two.tensors[kind]) for kind in zero_state.KINDS), one.name
