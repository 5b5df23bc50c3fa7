"""`Condition`: what a model is given besides x_t and the timesteps, one row a sample."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Condition(ABC):
    """Base of every condition: a frozen dataclass whose fields are all tensors with the batch first.

    Raises `ValueError` where the fields do not have the same number of rows.
    """

    def __post_init__(self) -> None:
        rows = {name: tensor.shape[0] for name, tensor in self.tensors().items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"{type(self).__name__}: fields differ in their number of rows: {rows}")

    @property
    def batch_size(self) -> int:
        return int(next(iter(self.tensors().values())).shape[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def cat(self, other: Self) -> Self:
        """The rows of this condition followed by those of `other`."""
        theirs = other.tensors()
        return dataclasses.replace(
            self, **{name: torch.cat([mine, theirs[name]]) for name, mine in self.tensors().items()}
        )

    @abstractmethod
    def unconditional(self) -> Self:
        """The same rows with everything dropped: the second branch of classifier-free guidance.

        Raises `ValueError` where a stage has no such branch.
        """
