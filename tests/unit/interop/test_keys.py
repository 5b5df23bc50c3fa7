"""Maps of keys: both ways without a bit of difference, and strict about every name and shape."""

from __future__ import annotations

import pytest
import torch

from unclip.interop.keys import InteropError, layer, packed_heads, prefixed, reshaped, same, to_ours, to_theirs

HEADS, WIDTH, D = 2, 3, 6
ENTRIES = [
    *packed_heads("qkv", ["to_q", "to_k", "to_v"], HEADS),
    *reshaped("query", "prd", (D,), (1, 1, D)),
    *prefixed([*layer("norm", "ln"), *same("scale", "gain")], ours="block.", theirs="blocks.0."),
]
SHAPES = {
    "qkv.weight": (3 * D, D),
    "qkv.bias": (3 * D,),
    "query": (D,),
    "block.norm.weight": (D,),
    "block.norm.bias": (D,),
    "block.scale": (),
}


def their_tensors() -> dict[str, torch.Tensor]:
    shapes = {"prd": (1, 1, D), "blocks.0.ln.weight": (D,), "blocks.0.ln.bias": (D,), "blocks.0.gain": ()}
    shapes |= {f"to_{part}.weight": (D, D) for part in "qkv"} | {f"to_{part}.bias": (D,) for part in "qkv"}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_there_and_back_is_the_same_to_the_bit() -> None:
    theirs = their_tensors()
    ours, account = to_ours("net", ENTRIES, theirs, SHAPES)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == SHAPES
    assert (account.taken, account.made) == (len(theirs), len(ours))
    back, _ = to_theirs("net", ENTRIES, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_heads_are_packed_one_after_the_other() -> None:
    """Attention of the packed layer is that of the three, head by head."""
    theirs = their_tensors()
    ours, _ = to_ours("net", ENTRIES, theirs, SHAPES)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    packed = (x @ ours["qkv.weight"].T + ours["qkv.bias"]).view(4, HEADS, 3, WIDTH)
    for index, part in enumerate("qkv"):
        alone = x @ theirs[f"to_{part}.weight"].T + theirs[f"to_{part}.bias"]
        torch.testing.assert_close(packed[:, :, index], alone.view(4, HEADS, WIDTH))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda theirs: theirs.pop("prd"), "prd is missing"),
        (lambda theirs: theirs.update(more=torch.ones(1)), "more is unknown"),
        (lambda theirs: theirs.update(prd=torch.ones(1, 1, D + 1)), r"prd have shapes \(1, 1, 7\)"),
        (
            lambda theirs: theirs.update({"blocks.0.gain": torch.ones(2)}),
            r"blocks.0.gain makes \(2,\) where block.scale",
        ),
        (lambda theirs: theirs["prd"].fill_(float("nan")), "prd has numbers that are not finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message: str) -> None:
    theirs = their_tensors()
    change(theirs)
    with pytest.raises(InteropError, match=message):
        to_ours("net", ENTRIES, theirs, SHAPES)


def test_ours_must_be_filled_and_used_up() -> None:
    with pytest.raises(InteropError, match="our network for net: other is missing"):
        to_ours("net", ENTRIES, their_tensors(), {**SHAPES, "other": (1,)})
    ours, _ = to_ours("net", ENTRIES, their_tensors(), SHAPES)
    with pytest.raises(InteropError, match="net: left is unknown"):
        to_theirs("net", ENTRIES, {**ours, "left": torch.ones(1)})
    with pytest.raises(InteropError, match=r"to_q\.weight is mapped twice"):
        to_ours("net", [*ENTRIES, *same("other", "to_q.weight")], their_tensors(), SHAPES)


def test_what_is_left_out_is_said_with_the_reason_and_must_be_there() -> None:
    theirs = {**their_tensors(), "positions": torch.arange(3)}
    _, account = to_ours("net", ENTRIES, theirs, SHAPES, dropped={"positions": "counts from 0"})
    assert account.dropped == {"positions": "counts from 0"}
    assert account.taken == len(theirs) - 1
    with pytest.raises(InteropError, match="positions is missing"):
        to_ours("net", ENTRIES, their_tensors(), SHAPES, dropped={"positions": "counts from 0"})
