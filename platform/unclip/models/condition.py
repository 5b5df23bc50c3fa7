"""`Condition`: what a model is given besides x_t and the timesteps, one row a sample."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Condition(ABC):
    """Base of every condition: a frozen dataclass of tensors with the batch first.

    A field is a tensor, a condition of its own, a tuple of such, or None for what a model does not have. Raises
    `ValueError` where the tensors do not have the same number of rows.
    """

    def __post_init__(self) -> None:
        rows = {name: tensor.shape[0] for name, tensor in self.tensors().items()}
        if any(count != next(iter(rows.values())) for count in rows.values()):
            raise ValueError(f"{type(self).__name__}: fields differ in their number of rows: {rows}")

    @property
    def batch_size(self) -> int:
        return int(next(iter(self.tensors().values())).shape[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its field's name; those further down as `field.inner` and `field.0`."""
        found: dict[str, torch.Tensor] = {}
        for field in dataclasses.fields(self):
            _collect(field.name, getattr(self, field.name), found)
        return found

    def map(self, change: Callable[..., torch.Tensor], *others: Self) -> Self:
        """The same condition with `change(tensor, *those at its place in others)` for every tensor."""
        conditions = (self, *others)
        return dataclasses.replace(
            self,
            **{
                field.name: _map(field.name, change, *(getattr(condition, field.name) for condition in conditions))
                for field in dataclasses.fields(self)
            },
        )

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda tensor: tensor.to(device))

    def cat(self, other: Self) -> Self:
        """The rows of this condition followed by those of `other`."""
        return self.map(lambda mine, theirs: torch.cat([mine, theirs]), other)

    def select(self, rows: torch.Tensor) -> Self:
        """The rows (n,) int64, in that order."""
        return self.map(lambda tensor: tensor[rows])

    @abstractmethod
    def unconditional(self) -> Self:
        """The same rows with everything dropped: the second branch of classifier-free guidance.

        Raises `ValueError` where a stage has no such branch.
        """


class PreparedCondition(Condition):
    """What a model's `prepare` made of a condition: all that does not change between the steps of a sampler."""

    def unconditional(self) -> Self:
        raise ValueError("a prepared condition has lost what could be dropped: take unconditional() before prepare()")


def _collect(name: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, Condition):
        found.update({f"{name}.{inner}": tensor for inner, tensor in value.tensors().items()})
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _collect(f"{name}.{index}", item, found)


def _map(name: str, change: Callable[..., torch.Tensor], *values: Any) -> Any:
    first = values[0]
    if any((value is None) != (first is None) for value in values):
        raise ValueError(f"{name} is there in one condition and missing in the other")
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return change(*values)
    if isinstance(first, tuple):
        return tuple(_map(name, change, *items) for items in zip(*values, strict=True))
    return first.map(change, *values[1:])
