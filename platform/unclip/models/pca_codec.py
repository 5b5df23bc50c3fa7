"""Image embeddings as codes: principal components, each cut into buckets (unCLIP, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

BUCKET_RANGE = 5.0
"""Buckets of a component cover plus and minus this many of its standard deviations."""


def to_buckets(values: torch.Tensor, bound: float, num_buckets: int) -> torch.Tensor:
    """The bucket, 0 to `num_buckets` - 1, of each value: equal widths between -`bound` and `bound`.

    Values beyond belong to the outermost bucket.
    """
    fractions = (values + bound) / (2 * bound)
    return (fractions * num_buckets).floor().clamp(0, num_buckets - 1).long()


def bucket_centres(codes: torch.Tensor, bound: float, num_buckets: int) -> torch.Tensor:
    """The middle of each bucket, float32: within bound / num_buckets of every value between the bounds."""
    return ((codes.float() + 0.5) / num_buckets * 2 - 1) * bound


class PcaCodec(nn.Module):
    """Embeddings (B, D) -> codes (B, K) of their K first principal components by falling eigenvalue, and back.

    A component is divided by its standard deviation and cut into buckets of equal width over +-`BUCKET_RANGE`. The paper
    does not give its edges. Equal widths bound the error of every value by half a width (0.005 deviations with 1024
    buckets, 1e-5 of the variance), where buckets of equal probability are coarse in the tails; edges that follow from
    the covariance need no second pass over the data; and a bucket means the same number of deviations in every
    component, so all share one table of embeddings.

    Buffers, taken from `set` or a state dictionary, and float32 in whatever precision the network around them runs:
        mean: (D,). components: (K, D), orthonormal rows. deviations: (K,), the roots of the eigenvalues.
    """

    mean: torch.Tensor
    components: torch.Tensor
    deviations: torch.Tensor

    def __init__(self, embed_dim: int, num_components: int, num_buckets: int) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("components", torch.eye(num_components, embed_dim))
        self.register_buffer("deviations", torch.ones(num_components))

    def set(self, *, mean: torch.Tensor, components: torch.Tensor, deviations: torch.Tensor) -> None:
        """Takes over a fitted basis; `RuntimeError` names what has another shape."""
        self.load_state_dict({"mean": mean, "components": components, "deviations": deviations})

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, K) int64 codes."""
        scores = (z.float() - self.mean) @ self.components.T
        return to_buckets(scores / self.deviations, BUCKET_RANGE, self.num_buckets)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, K) codes -> (B, D) float32, of the middles of their buckets."""
        scores = bucket_centres(codes, BUCKET_RANGE, self.num_buckets) * self.deviations
        return scores @ self.components + self.mean

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PcaCodec:
        """Goes to other devices with the network, but not to other precisions: in bfloat16 codes would be others."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(kept, recurse)
        return self
