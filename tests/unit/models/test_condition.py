from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from unclip.models.condition import Condition, PreparedCondition
from unclip.models.conditioners import CaptionCondition, ImageCondition
from unclip.models.decoder import DecoderCondition
from unclip.models.upsampler import UpsamplerCondition


@dataclass(frozen=True)
class Nested(PreparedCondition):
    """Every kind of field that a condition may have."""

    plain: torch.Tensor
    inner: Condition
    layers: tuple[torch.Tensor | None, ...]
    absent: torch.Tensor | None = None


def make_decoder_condition(rows: int, *, dropped: bool = False) -> DecoderCondition:
    drop = torch.full((rows,), dropped)
    return DecoderCondition(
        image=ImageCondition(dropped=drop, embed=torch.randn(rows, 4)),
        text=CaptionCondition(
            dropped=drop, tokens=torch.randint(9, (rows, 5)), mask=torch.ones(rows, 5, dtype=torch.bool)
        ),
    )


def make_nested(rows: int) -> Nested:
    return Nested(
        torch.randn(rows, 2), make_decoder_condition(rows), (torch.randn(rows, 3), None, torch.randn(rows, 1))
    )


def test_cat_keeps_rows_in_order() -> None:
    first, second = make_nested(2), make_nested(3)
    both = first.cat(second)
    assert both.batch_size == 5
    assert both.layers[1] is None
    assert both.absent is None
    assert both.tensors().keys() == first.tensors().keys()
    for name, tensor in both.tensors().items():
        torch.testing.assert_close(tensor[:2], first.tensors()[name])
        torch.testing.assert_close(tensor[2:], second.tensors()[name])


def test_select_picks_rows_in_the_order_asked_for() -> None:
    cond, rows = make_nested(4), torch.tensor([2, 0, 2])
    picked = cond.select(rows)
    assert type(picked) is Nested
    assert picked.batch_size == 3
    assert type(picked.inner) is DecoderCondition
    for name, tensor in picked.tensors().items():
        torch.testing.assert_close(tensor, cond.tensors()[name][rows])


def test_tensors_are_named_by_their_place() -> None:
    names = set(make_nested(1).tensors())
    assert names == {
        "plain",
        "layers.0",
        "layers.2",
        "inner.image.dropped",
        "inner.image.embed",
        "inner.text.dropped",
        "inner.text.tokens",
        "inner.text.mask",
    }


def test_unconditional_drops_everything_and_leaves_the_original() -> None:
    cond = make_decoder_condition(2)
    assert all(part.dropped.all() for part in cond.unconditional().parts().values())
    assert not any(part.dropped.any() for part in cond.parts().values())
    assert cond.unconditional().tensors().keys() == cond.tensors().keys()


def test_what_inpainting_knows_is_not_dropped() -> None:
    known, mask = torch.randn(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    unconditional = DecoderCondition(known=known, known_mask=mask).unconditional()
    assert unconditional.known is known
    assert unconditional.known_mask is mask


def test_prepared_conditions_cannot_be_dropped_any_more() -> None:
    with pytest.raises(ValueError, match="take unconditional\\(\\) before prepare\\(\\)"):
        make_nested(1).unconditional()


def test_upsampler_has_no_unconditional_branch() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale must be 1\.0"):
        UpsamplerCondition(torch.zeros(1, 3, 4, 4)).unconditional()


def test_to_moves_every_tensor() -> None:
    moved = make_nested(2).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


def test_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="ImageCondition: fields differ in their number of rows"):
        ImageCondition(dropped=torch.zeros(3, dtype=torch.bool), embed=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Nested: fields differ in their number of rows"):
        Nested(torch.zeros(2, 2), make_decoder_condition(2), (torch.zeros(3, 1),))


def test_conditions_with_other_parts_do_not_go_together() -> None:
    whole = make_decoder_condition(1)
    with pytest.raises(ValueError, match="text is there in one condition and missing in the other"):
        whole.cat(DecoderCondition(image=whole.image))
