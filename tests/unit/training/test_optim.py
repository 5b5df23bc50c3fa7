from __future__ import annotations

import pytest
import torch
from torch import nn

from unclip.training.optim import EmaAdamW, OptimizerConfig, ema_decay_at, learning_rate_at, parameter_groups


class Mixed(nn.Module):
    no_decay = ("position",)

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 3)
        self.position = nn.Parameter(torch.randn(2, 3))
        self.queries = nn.Parameter(torch.randn(2, 3))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.layer = nn.Sequential(nn.Conv1d(2, 2, 1), nn.LayerNorm(3), nn.Linear(3, 3))


def names(module: nn.Module, group: dict[str, list[nn.Parameter]]) -> list[str]:
    found = {parameter: name for name, parameter in module.named_parameters()}
    return [found[parameter] for parameter in group["params"]]


def test_groups_decay_matrices_and_kernels_only_in_the_order_of_names() -> None:
    module = Mixed()
    decayed, undecayed = parameter_groups(module, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert names(module, decayed) == ["layer.0.weight", "layer.2.weight", "queries"]
    assert undecayed["weight_decay"] == 0.0
    assert names(module, undecayed) == [
        "layer.0.bias", "layer.1.bias", "layer.1.weight", "layer.2.bias", "position", "temperature", "tokens.weight",
    ]  # fmt: skip


def test_a_module_without_matrices_has_one_group() -> None:
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.3)] == [0.0]


def test_it_is_adamw_and_the_average_follows_the_formula() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(learning_rate=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2, ema_decay=0.7)
    optimizer = config.build(ours)
    groups = [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    average = theirs.weight.detach().clone()
    for rate, decay in [(0.01, 0.7), (0.02, 0.2), (0.005, 0.9)]:
        x = torch.randn(3, 7)
        for group in optimizer.param_groups:
            group |= {"lr": rate, "ema_decay": decay}
        for group in reference.param_groups:
            group["lr"] = rate
        for module, stepped in ((ours, optimizer), (theirs, reference)):
            stepped.zero_grad()
            module(x).square().mean().backward()
            stepped.step()
        average = decay * average + (1 - decay) * theirs.weight.detach()
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(optimizer.state[ours.weight]["ema"], average, atol=1e-6, rtol=1e-6)


def test_without_a_gradient_weights_and_average_stay() -> None:
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = EmaAdamW([{"params": [still, moving]}], OptimizerConfig(learning_rate=0.1, ema_decay=0.5))
    optimizer.state_of(still)["ema"].fill_(9.0)
    moving.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(optimizer.state[still]["ema"], torch.full((2, 2), 9.0))
    torch.testing.assert_close(optimizer.state[moving]["ema"], 0.5 + 0.5 * moving.detach())


@pytest.mark.parametrize(("step", "decay"), [(0, 1 / 10), (90, 91 / 100), (10**6, 0.9999)])
def test_warm_up_of_the_average(step: int, decay: float) -> None:
    assert ema_decay_at(step, OptimizerConfig(learning_rate=1.0, ema_decay=0.9999)) == decay
    assert ema_decay_at(step, OptimizerConfig(learning_rate=1.0, ema_decay=0.9999, ema_warmup=False)) == 0.9999


def test_constant_rate_after_a_linear_warm_up() -> None:
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4)
    assert [learning_rate_at(step, config, 100) for step in (0, 1, 3, 4, 99, 10**6)] == [0.1, 0.2, 0.4, 0.4, 0.4, 0.4]


def test_cosine_from_the_warm_up_to_the_last_step() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate_at(9, config, 110) == 2.0
    assert learning_rate_at(10, config, 110) == 2.0
    assert learning_rate_at(60, config, 110) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate_at(110, config, 110) == pytest.approx(0.2)
    assert learning_rate_at(500, config, 110) == pytest.approx(0.2)
    assert learning_rate_at(5, config, 5) == pytest.approx(1.2)  # a run that ends inside the warm-up
