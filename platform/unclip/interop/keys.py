"""Which tensor of another library is which of ours: maps that go both ways and leave nothing out.

A map is a list of `Entry`: some tensors of theirs make one of ours, and that one makes those again, bit by bit. `to_ours` and
`to_theirs` follow it strictly: a tensor that no entry knows, one that an entry lacks, and a shape that does not fit are
refused by name. What is not taken over is named with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Tensors = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_SHOWN = 8


class InteropError(ValueError):
    """Something cannot be taken over exactly; the message names the tensor or the field, and its value."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and those of theirs that hold the same numbers.

    pack: theirs, in the order of `theirs`, to ours; unpack: the other way. Each undoes the other exactly.
    """

    ours: str
    theirs: tuple[str, ...]
    pack: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    unpack: Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Account:
    """What became of the tensors of one part of a source: `taken` of theirs made `made` of ours (or of ours theirs)."""

    part: str
    taken: int
    made: int
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors or settings that were left out, each with the reason."""
    what: str = "tensors"
    """What is counted, for people."""

    def to_dict(self) -> dict[str, object]:
        return {"part": self.part, "taken": self.taken, "made": self.made, "dropped": dict(self.dropped)}

    def lines(self) -> list[str]:
        """For people: the counts, then what was left out and why."""
        return [f"{self.part}: {self.taken} {self.what} make {self.made}"] + [
            f"  left out: {name} ({reason})" for name, reason in self.dropped.items()
        ]


def same(ours: str, theirs: str) -> list[Entry]:
    """One tensor under two names."""
    return [Entry(ours, (theirs,), lambda parts: parts[0], lambda tensor: (tensor,))]


def reshaped(ours: str, theirs: str, ours_shape: Sequence[int], theirs_shape: Sequence[int]) -> list[Entry]:
    """One tensor with the same numbers in the same order, in two shapes: dimensions of size 1 here or there."""
    return [
        Entry(
            ours, (theirs,), lambda parts: parts[0].reshape(ours_shape), lambda tensor: (tensor.reshape(theirs_shape),)
        )
    ]


def layer(ours: str, theirs: str) -> list[Entry]:
    """Weight and bias of a layer: linear, convolution or norm."""
    return [*same(f"{ours}.weight", f"{theirs}.weight"), *same(f"{ours}.bias", f"{theirs}.bias")]


def packed_heads(ours: str, theirs: Sequence[str], heads: int) -> list[Entry]:
    """Linear layers of theirs (query, key and value, say) in one of ours, packed head by head as GLIDE and Karlo do.

    Rows of the first head come first: those of the first layer, of the second, and so on; then those of the next head.
    """
    parts = len(theirs)

    def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)

    def unpack(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, parts, -1)).unbind(dim=1)]

    return [
        Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), pack, unpack) for kind in ("weight", "bias")
    ]


def tokens_fastest(ours: str, theirs: str, tokens: int) -> list[Entry]:
    """A layer with a row for each channel of each token: theirs has all tokens' first channels first, ours the first token."""

    def pack(found: Sequence[torch.Tensor]) -> torch.Tensor:
        return found[0].unflatten(0, (-1, tokens)).transpose(0, 1).flatten(0, 1)

    def unpack(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return (tensor.unflatten(0, (tokens, -1)).transpose(0, 1).flatten(0, 1),)

    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), pack, unpack) for kind in ("weight", "bias")]


def prefixed(entries: Iterable[Entry], *, ours: str = "", theirs: str = "") -> list[Entry]:
    """The same entries, of modules inside others."""
    return [
        Entry(f"{ours}{entry.ours}", tuple(f"{theirs}{name}" for name in entry.theirs), entry.pack, entry.unpack)
        for entry in entries
    ]


def to_ours(
    part: str, entries: Iterable[Entry], theirs: Tensors, shapes: Shapes, *, dropped: Mapping[str, str] | None = None
) -> tuple[dict[str, torch.Tensor], Account]:
    """The tensors of one of our networks, float32, made of `theirs`.

    Args:
        part: what `theirs` are, for messages and the account.
        shapes: of the state dictionary of our network, all of which must come out.
        dropped: tensors of theirs that are left out, each with the reason; they must be there.

    Raises `InteropError` naming what is missing, unknown, of another shape or not finite.
    """
    entries, dropped = list(entries), dict(dropped or {})
    known = [name for entry in entries for name in entry.theirs] + list(dropped)
    _check_names(part, known, theirs.keys())
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        found = [theirs[name].detach().cpu().float() for name in entry.theirs]
        for name, tensor in zip(entry.theirs, found, strict=True):
            if not bool(tensor.isfinite().all()):
                raise InteropError(f"{part}: {name} has numbers that are not finite")
        try:
            made[entry.ours] = entry.pack(found).contiguous()
        except RuntimeError:
            sizes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
            raise InteropError(f"{part}: {', '.join(entry.theirs)} have shapes {sizes}, which do not fit") from None
    _check_names(f"our network for {part}", shapes.keys(), [entry.ours for entry in entries])
    sources = {entry.ours: ", ".join(entry.theirs) for entry in entries}
    wrong = [
        f"{sources[name]} makes {tuple(tensor.shape)} where {name} has {tuple(shapes[name])}"
        for name, tensor in made.items()
        if tuple(tensor.shape) != tuple(shapes[name])
    ]
    if wrong:
        raise InteropError(f"{part}: shapes do not fit the configuration: {_some(wrong, '; ')}")
    return made, Account(part, taken=len(known) - len(dropped), made=len(made), dropped=dropped)


def to_theirs(part: str, entries: Iterable[Entry], ours: Tensors) -> tuple[dict[str, torch.Tensor], Account]:
    """Their tensors made of all of `ours`; raises `InteropError` as `to_ours`."""
    entries = list(entries)
    _check_names(part, [entry.ours for entry in entries], ours.keys())
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        parts = entry.unpack(ours[entry.ours])
        made |= {name: tensor.contiguous() for name, tensor in zip(entry.theirs, parts, strict=True)}
    return made, Account(part, taken=len(entries), made=len(made))


def _check_names(part: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises `InteropError` unless both have the same names, each once."""
    wanted, there = Counter(expected), Counter(found)
    problems = [f"{name} is mapped twice" for name in sorted(wanted | there) if max(wanted[name], there[name]) > 1]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - there.keys())]
    problems += [f"{name} is unknown" for name in sorted(there.keys() - wanted.keys())]
    if problems:
        raise InteropError(f"{part}: {_some(problems, ', ')}")


def _some(texts: Sequence[str], separator: str) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more
