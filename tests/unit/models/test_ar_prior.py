"""The autoregressive prior's network, against its own laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from unclip.models.ar_prior import ARPriorConfig, ARPriorModel, code_losses
from unclip.models.prior import PriorCondition

K, BUCKETS, ROWS = 4, 16, 3
CONFIG = ARPriorConfig(
    embed_dim=6, num_components=K, num_buckets=BUCKETS, vocab_size=50, context_length=8, width=32, depth=2, heads=4
)
RANDOM = torch.Generator().manual_seed(2)
DOTS = torch.randint(BUCKETS, (ROWS,), generator=RANDOM)
CODES = torch.randint(BUCKETS, (ROWS, K), generator=RANDOM)


@pytest.fixture
def model(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomized(CONFIG.build())


def make_condition(dropped: bool = False) -> PriorCondition:
    generator = torch.Generator().manual_seed(1)
    return PriorCondition(
        text_embed=nn.functional.normalize(torch.randn(ROWS, 6, generator=generator), dim=1),
        tokens=torch.randint(50, (ROWS, 8), generator=generator),
        text_mask=torch.arange(8) < torch.tensor([[5], [8], [1]]),
        text_dropped=torch.full((ROWS,), dropped),
    )


def variations(cond: PriorCondition) -> dict[str, PriorCondition]:
    """The condition with one kind of text information changed."""
    return {
        "tokens": dataclasses.replace(cond, tokens=(cond.tokens + 1) % 50),
        "text_embed": dataclasses.replace(cond, text_embed=-cond.text_embed),
        "text_mask": dataclasses.replace(cond, text_mask=(torch.arange(8) < 3).expand(ROWS, 8)),
    }


@pytest.mark.parametrize("changed", ["tokens", "text_embed", "text_mask"])
def test_text_matters_unless_dropped(model: ARPriorModel, changed: str) -> None:
    kept, dropped = make_condition(), make_condition(dropped=True)
    for logits, others in zip(model(DOTS, CODES, kept), model(DOTS, CODES, variations(kept)[changed]), strict=True):
        assert (logits - others).abs().flatten(1).amax(dim=1).min() > 1e-4
    for logits, same in zip(model(DOTS, CODES, dropped), model(DOTS, CODES, variations(dropped)[changed]), strict=True):
        torch.testing.assert_close(logits, same, rtol=0, atol=0)


def test_the_dot_product_is_dropped_with_the_text(model: ARPriorModel) -> None:
    other = (DOTS + 1) % BUCKETS
    kept, dropped = make_condition(), make_condition(dropped=True)
    assert (model(DOTS, CODES, kept)[1] - model(other, CODES, kept)[1]).abs().amax() > 1e-4
    torch.testing.assert_close(model(DOTS, CODES, dropped)[1], model(other, CODES, dropped)[1], rtol=0, atol=0)


def test_without_text_the_codes_still_matter(model: ARPriorModel) -> None:
    cond = make_condition(dropped=True)
    changed = torch.cat([(CODES[:, :1] + 1) % BUCKETS, CODES[:, 1:]], dim=1)
    difference = (model(DOTS, CODES, cond)[1] - model(DOTS, changed, cond)[1]).abs()
    assert difference[:, 1:].flatten(1).amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("index", range(K))
def test_a_code_moves_the_logits_of_later_codes_only(model: ARPriorModel, index: int) -> None:
    cond, changed = make_condition(), CODES.clone()
    changed[:, index] = (CODES[:, index] + 1) % BUCKETS
    before, after = model(DOTS, CODES, cond), model(DOTS, changed, cond)
    assert torch.equal(before[0], after[0])
    moved = (before[1] != after[1]).flatten(2).any(dim=2).any(dim=0)
    assert moved.tolist() == [position > index for position in range(K)]


def test_the_dot_product_moves_the_codes_but_not_itself(model: ARPriorModel) -> None:
    before, after = model(DOTS, CODES, make_condition()), model((DOTS + 1) % BUCKETS, CODES, make_condition())
    assert torch.equal(before[0], after[0])
    assert (before[1] != after[1]).flatten(2).any(dim=2).all()


def test_padding_does_not_matter(model: ARPriorModel) -> None:
    cond = make_condition()
    tokens = torch.where(cond.text_mask, cond.tokens, (cond.tokens + 1) % 50)
    for logits, same in zip(
        model(DOTS, CODES, cond), model(DOTS, CODES, dataclasses.replace(cond, tokens=tokens)), strict=True
    ):
        torch.testing.assert_close(logits, same, rtol=0, atol=0)


@pytest.mark.parametrize("dropped", [False, True])
def test_generation_has_the_logits_of_the_whole_sequence(model: ARPriorModel, dropped: bool) -> None:
    """With its cache, position by position, whatever is chosen."""
    cond, seen, chosen = make_condition(dropped=dropped), [], [DOTS, *CODES.T]

    def choose(index: int, logits: torch.Tensor) -> torch.Tensor:
        assert index == len(seen)
        seen.append(logits)
        return chosen[index]

    assert torch.equal(model.generate(cond, choose), CODES)
    dot_logits, code_logits = model(DOTS, CODES, cond)
    torch.testing.assert_close(seen[0], dot_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(seen[1:], dim=1), code_logits, rtol=1e-5, atol=1e-5)


def test_losses_are_the_negative_log_likelihoods(model: ARPriorModel) -> None:
    logits = model(DOTS, CODES, make_condition())
    dot_loss, code_loss = code_losses(logits, DOTS, CODES)
    assert dot_loss.shape == (ROWS,)
    for row in range(ROWS):
        torch.testing.assert_close(dot_loss[row], -logits[0][row].log_softmax(dim=0)[DOTS[row]])
        for index in range(K):
            expected = -logits[1][row, index].log_softmax(dim=0)[CODES[row, index]]
            torch.testing.assert_close(code_loss[row, index], expected)


def test_dot_products_are_cut_evenly_between_their_bounds(model: ARPriorModel) -> None:
    angles = torch.linspace(0, torch.pi, ROWS * 7)
    z_i = torch.nn.functional.pad(torch.stack([angles.cos(), angles.sin()], dim=1), (0, 4))
    z_t = torch.zeros_like(z_i)
    z_t[:, 0] = 1
    dots, codes = model.encode(z_i, z_t)
    middles = (dots + 0.5) * 2 / BUCKETS - 1
    assert (middles - angles.cos()).abs().max() <= 1 / BUCKETS + 1e-6
    assert dots[0] == BUCKETS - 1
    assert dots[-1] == 0
    assert codes.shape == (ROWS * 7, K)


def test_it_starts_even_and_trains_in_bfloat16() -> None:
    model = CONFIG.build().bfloat16()
    logits = model(DOTS, CODES, make_condition())
    assert all(part.dtype == torch.float32 and not part.any() for part in logits)
    sum(part.mean() for part in code_losses(logits, DOTS, CODES)).backward()
    assert model.code_out.weight.grad.abs().sum() > 0
    assert model.dot_out.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_more_components_than_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_components = 7: embeddings have embed_dim = 6"):
        ARPriorConfig.model_validate(CONFIG.to_dict() | {"num_components": 7})
