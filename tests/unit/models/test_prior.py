from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from unclip.models.prior import PriorCondition, PriorConfig, PriorModel

CONFIG = PriorConfig(embed_dim=6, vocab_size=50, context_length=8, width=32, depth=2, heads=4)


@pytest.fixture
def model(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomized(CONFIG.build())


def make_condition(rows: int = 3, dropped: bool = False) -> PriorCondition:
    generator = torch.Generator().manual_seed(1)
    return PriorCondition(
        text_embed=nn.functional.normalize(torch.randn(rows, 6, generator=generator), dim=1),
        tokens=torch.randint(50, (rows, 8), generator=generator),
        text_mask=(torch.arange(8) < 5).expand(rows, 8),
        text_dropped=torch.full((rows,), dropped),
    )


X_T, TIMESTEPS = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 500, 999])


def variations(cond: PriorCondition) -> dict[str, PriorCondition]:
    """The condition with one kind of text information changed."""
    return {
        "tokens": dataclasses.replace(cond, tokens=(cond.tokens + 1) % 50),
        "text_embed": dataclasses.replace(cond, text_embed=-cond.text_embed),
        "text_mask": dataclasses.replace(cond, text_mask=(torch.arange(8) < 3).expand(3, 8)),
    }


@pytest.mark.parametrize("changed", ["tokens", "text_embed", "text_mask"])
def test_text_matters_unless_dropped(model: nn.Module, changed: str) -> None:
    kept, dropped = make_condition(), make_condition(dropped=True)
    assert (model(X_T, TIMESTEPS, kept) - model(X_T, TIMESTEPS, variations(kept)[changed])).abs().amin() > 1e-4
    same = model(X_T, TIMESTEPS, variations(dropped)[changed])
    torch.testing.assert_close(model(X_T, TIMESTEPS, dropped), same, rtol=0, atol=0)


def test_without_text_the_state_and_time_still_matter(model: nn.Module) -> None:
    cond = make_condition(dropped=True)
    output = model(X_T, TIMESTEPS, cond)
    assert (output - model(X_T + 0.1, TIMESTEPS, cond)).abs().amax(dim=1).min() > 1e-3
    assert (output - model(X_T, TIMESTEPS - 1, cond)).abs().amax(dim=1).min() > 1e-4


def test_padding_does_not_matter(model: nn.Module) -> None:
    cond = make_condition()
    tokens = torch.cat([cond.tokens[:, :5], (cond.tokens[:, 5:] + 1) % 50], dim=1)
    other = model(X_T, TIMESTEPS, dataclasses.replace(cond, tokens=tokens))
    torch.testing.assert_close(model(X_T, TIMESTEPS, cond), other, rtol=0, atol=0)


def test_empty_mask_gives_numbers(model: nn.Module) -> None:
    cond = dataclasses.replace(make_condition(), text_mask=torch.zeros(3, 8, dtype=torch.bool))
    assert model(X_T, TIMESTEPS, cond).isfinite().all()


def test_attention_is_causal(model: PriorModel) -> None:
    """Changing x_t moves only the last two states of the sequence, its own and the query's."""
    states = []
    model.transformer.blocks[0].register_forward_hook(lambda _module, _inputs, output: states.append(output))
    model(X_T, TIMESTEPS, make_condition())
    model(X_T + 1, TIMESTEPS, make_condition())
    changed = (states[0] != states[1]).any(dim=2).any(dim=0)
    assert changed.tolist() == [False] * 10 + [True] * 2


def test_drops_are_per_sample(model: nn.Module) -> None:
    kept, dropped = make_condition(), make_condition(dropped=True)
    mixed = dataclasses.replace(kept, text_dropped=torch.tensor([False, True, False]))
    expected = model(X_T, TIMESTEPS, kept)
    expected[1] = model(X_T, TIMESTEPS, dropped)[1]
    torch.testing.assert_close(model(X_T, TIMESTEPS, mixed), expected, rtol=1e-5, atol=1e-5)


def test_output_starts_at_zero_and_trains_in_bfloat16() -> None:
    model = CONFIG.build().bfloat16()
    output = model(X_T, TIMESTEPS, make_condition())
    assert output.dtype == torch.float32
    assert not output.any()
    (output - 1).square().mean().backward()
    assert model.image_embed_out.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dropped", [False, True])
def test_a_prepared_condition_gives_the_same_numbers(model: PriorModel, dropped: bool) -> None:
    cond = dataclasses.replace(
        make_condition(dropped=dropped), text_mask=torch.arange(8) < torch.tensor([[5], [0], [8]])
    )
    prepared = model.prepare(cond)
    for shift in (0, 1):  # a second step: the first one leaves no trace
        x_t, timesteps = X_T + shift, TIMESTEPS - shift
        torch.testing.assert_close(model(x_t, timesteps, prepared), model(x_t, timesteps, cond), rtol=1e-5, atol=1e-5)


def test_a_prepared_step_runs_three_positions(model: PriorModel) -> None:
    lengths = []
    prepared = model.prepare(make_condition())
    model.transformer.blocks[0].register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[1]))
    model(X_T, TIMESTEPS, prepared)
    assert lengths == [3]


def test_prepared_rows_can_be_chosen_and_joined(model: PriorModel) -> None:
    cond, rows = make_condition(), torch.tensor([2, 0])
    prepared = model.prepare(cond)
    joined = prepared.select(rows).cat(prepared.select(torch.tensor([1])))
    order = torch.tensor([2, 0, 1])
    output = model(X_T[order], TIMESTEPS[order], joined)
    torch.testing.assert_close(output, model(X_T, TIMESTEPS, cond)[order], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="prepared"):
        prepared.unconditional()


def test_gradients_reach_the_state_through_a_prepared_condition(model: PriorModel) -> None:
    cond, gradients = make_condition(), []
    for given in (cond, model.prepare(cond)):
        x_t = X_T.clone().requires_grad_()
        gradients += torch.autograd.grad(model(x_t, TIMESTEPS, given).square().sum(), x_t)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_inputs_stay_as_they_are(model: PriorModel) -> None:
    cond, x_t = make_condition(), X_T.clone()
    before = {name: tensor.clone() for name, tensor in cond.tensors().items()}
    model(x_t, TIMESTEPS, model.prepare(cond))
    model(x_t, TIMESTEPS, cond)
    assert torch.equal(x_t, X_T)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cond.tensors().items())


def test_rows_that_are_told_the_same_are_computed_once(model: PriorModel) -> None:
    """All rows without text are alike; others are where caption, mask and text embedding are."""
    kept = make_condition()
    text_embed, mask = kept.text_embed.clone(), kept.text_mask.clone()
    text_embed[1] += 1e-6
    mask[2, 4] = False
    others = [dataclasses.replace(kept, text_embed=text_embed), dataclasses.replace(kept, text_mask=mask)]
    cond = kept.cat(make_condition(dropped=True)).cat(kept).cat(others[0]).cat(others[1])
    rows, place = cond.distinct()
    assert len(rows) == 3 + 1 + 1 + 1
    assert place[:3].tolist() == place[6:9].tolist()
    assert len(set(place[3:6].tolist())) == 1
    seen: list[int] = []
    model.prefix.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    prepared = model.prepare(cond)
    assert seen == [6]
    x_t, timesteps = torch.randn(15, 6), torch.arange(15) * 60
    torch.testing.assert_close(model(x_t, timesteps, prepared), model(x_t, timesteps, cond), rtol=1e-5, atol=1e-5)
