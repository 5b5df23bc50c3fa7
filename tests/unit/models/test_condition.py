from __future__ import annotations

import pytest
import torch

from unclip.models.decoder import DecoderCondition
from unclip.models.prior import PriorCondition
from unclip.models.upsampler import UpsamplerCondition


def make_prior_condition(rows: int, dropped: bool) -> PriorCondition:
    return PriorCondition(
        text_embed=torch.randn(rows, 4),
        tokens=torch.randint(9, (rows, 5)),
        text_mask=torch.ones(rows, 5, dtype=torch.bool),
        text_dropped=torch.full((rows,), dropped),
    )


def test_cat_keeps_rows_in_order() -> None:
    first, second = make_prior_condition(2, False), make_prior_condition(3, True)
    both = first.cat(second)
    assert both.batch_size == 5
    for name, tensor in both.tensors().items():
        torch.testing.assert_close(tensor[:2], first.tensors()[name])
        torch.testing.assert_close(tensor[2:], second.tensors()[name])


def test_unconditional_drops_everything_and_leaves_the_original() -> None:
    prior = make_prior_condition(2, False)
    assert prior.unconditional().text_dropped.all()
    assert not prior.text_dropped.any()
    kept = torch.zeros(2, dtype=torch.bool)
    decoder = DecoderCondition(torch.randn(2, 4), prior.tokens, prior.text_mask, image_dropped=kept, text_dropped=kept)
    assert decoder.unconditional().image_dropped.all()
    assert decoder.unconditional().text_dropped.all()


def test_upsampler_has_no_unconditional_branch() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale must be 1\.0"):
        UpsamplerCondition(torch.zeros(1, 3, 4, 4)).unconditional()


def test_to_moves_every_field() -> None:
    moved = make_prior_condition(2, False).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


def test_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="PriorCondition: fields differ in their number of rows"):
        PriorCondition(torch.zeros(2, 4), torch.zeros(3, 5), torch.ones(2, 5), torch.ones(2))
