"""Train, held-out and compositional splits of the OpenMoji records.

`compositional` holds whole combinations, (role, skin tone, hair) and (colour, shape), none of which is in `train`
although each part is. `heldout` is a random share of the rest. What looks or reads alike stays together: the same
combination of role, skin tone and hair (whose genders and directions are often one drawing), the same caption, the same
SVG.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, Protocol

from unclip.data.openmoji_captions import SKIN_TONES

Split = Literal["train", "heldout", "compositional"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "compositional")

Combination = tuple[str, ...]

_ROLES_PER_HELD_OUT = 8
_MIN_COLOURS = 4
_COLOURS_PER_SHAPE = 2


class Drawing(Protocol):
    """What the splits need to know of a record."""

    @property
    def hexcode(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def svg_sha256(self) -> str: ...
    @property
    def role(self) -> str | None: ...
    @property
    def skin_tone(self) -> str | None: ...
    @property
    def hair(self) -> str | None: ...
    @property
    def colour(self) -> str | None: ...
    @property
    def shape(self) -> str | None: ...


def combination(drawing: Drawing) -> Combination | None:
    """The combination that a record shows, by which it is held out; None where it has fewer than two parts."""
    if drawing.colour is not None and drawing.shape is not None:
        return ("colour", drawing.colour, "shape", drawing.shape)
    if drawing.role is not None and drawing.skin_tone is not None:
        return ("role", drawing.role, "skin_tone", drawing.skin_tone, "hair", drawing.hair or "")
    return None


def assign_splits(drawings: Sequence[Drawing], *, seed: int, heldout_fraction: float) -> list[Split]:
    """The split of each drawing, in their order; the same for the same set of drawings, seed and fraction.

    Raises `ValueError` where a part of a held-out combination would not occur in training.
    """
    held_out = _held_out_combinations(drawings, seed)
    groups = _alike(drawings)
    splits: list[Split] = ["train"] * len(drawings)
    for group in groups:
        combinations = {combination(drawings[index]) for index in group}
        is_coloured_shape = any(drawings[index].shape is not None for index in group)
        if combinations & held_out:
            split: Split = "compositional"
        elif not is_coloured_shape and _share(seed, min(drawings[i].hexcode for i in group)) < heldout_fraction:
            split = "heldout"  # never coloured shapes: there are too few to lose one more
        else:
            split = "train"
        for index in group:
            splits[index] = split
    _check_parts(drawings, splits)
    return splits


def _held_out_combinations(drawings: Sequence[Drawing], seed: int) -> set[Combination | None]:
    """For every hair one skin tone, for one role in eight one skin tone, for every shape two colours."""
    held_out: set[Combination | None] = set()
    shown = {combination(drawing) for drawing in drawings} - {None}
    styled = sorted({(d.role, d.hair) for d in drawings if d.role and d.hair and d.skin_tone})
    plain = sorted({d.role for d in drawings if d.role and not d.hair and d.skin_tone in SKIN_TONES})
    chosen = sorted(plain, key=lambda role: _share(seed, f"role {role}"))[: len(plain) // _ROLES_PER_HELD_OUT]
    for number, (role, hair) in enumerate([*styled, *((role, "") for role in chosen if role != "person")]):
        tone = SKIN_TONES[(number + seed) % len(SKIN_TONES)]
        held_out.add(("role", str(role), "skin_tone", tone, "hair", hair or ""))
    colours_of = {d.shape: set[str]() for d in drawings if d.shape}
    for drawing in drawings:
        if drawing.shape and drawing.colour:
            colours_of[drawing.shape].add(drawing.colour)
    in_grid = Counter(colour for colours in colours_of.values() if len(colours) >= _MIN_COLOURS for colour in colours)
    taken: set[str] = set()
    for shape in sorted(str(shape) for shape, colours in colours_of.items() if len(colours) >= _MIN_COLOURS):
        free = [colour for colour in colours_of[shape] if in_grid[colour] >= 2 and colour not in taken]
        for colour in sorted(free, key=lambda colour: _share(seed, f"{shape} {colour}"))[:_COLOURS_PER_SHAPE]:
            taken.add(colour)  # a colour is held out of one shape only, so that the others show it
            held_out.add(("colour", colour, "shape", shape))
    return held_out & shown


def _alike(drawings: Sequence[Drawing]) -> Iterator[list[int]]:
    """Groups of drawings with one combination (or role), caption or file content, directly or through others."""
    parent = list(range(len(drawings)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[Hashable, int] = {}
    for index, drawing in enumerate(drawings):
        look = (drawing.role, drawing.skin_tone, drawing.hair) if drawing.role else combination(drawing)
        for key in (look, ("caption", drawing.caption), ("svg", drawing.svg_sha256)):
            if key is not None:
                parent[root(index)] = root(first_with.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(drawings)):
        groups.setdefault(root(index), []).append(index)
    yield from groups.values()


def _check_parts(drawings: Sequence[Drawing], splits: Sequence[Split]) -> None:
    trained = {
        (name, getattr(drawing, name))
        for drawing, split in zip(drawings, splits, strict=True)
        if split == "train"
        for name in ("role", "skin_tone", "hair", "colour", "shape")
    }
    for drawing, split in zip(drawings, splits, strict=True):
        for name in ("role", "skin_tone", "hair", "colour", "shape"):
            if split == "compositional" and (name, getattr(drawing, name)) not in trained:
                raise ValueError(
                    f"{drawing.caption!r} is held out, but no training record has its {name}; take another seed"
                )


def _share(seed: int, name: str) -> float:
    """A number in [0, 1) that only depends on the seed and the name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little") / 2.0**64
