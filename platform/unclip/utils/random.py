"""Keyed randomness: every sample has its own stream, independent of batch, rank, device and world size.

A counter-based generator in the manner of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"): a value is a
hash of (key, draw, index), so drawing needs no state to be shared or stored. The mixing function is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014), applied twice.
"""

from __future__ import annotations

import hashlib
import math
from typing import Self

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def tag_key(tag: str) -> int:
    """A signed 64-bit number that names an independent stream; stable across processes and versions."""
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little", signed=True)


class SampleGenerator:
    """Draws for a batch of samples; row i depends on `keys[i]` and on the number of its draws before, on nothing else.

    Args:
        keys: (B,) int64, one key a sample. Draws come on the device that holds the keys.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        if keys.dtype != torch.int64 or keys.ndim != 1:
            raise ValueError(f"keys must be an int64 vector, not {keys.dtype} of shape {tuple(keys.shape)}")
        self.keys = keys
        self._draws = torch.zeros_like(keys)  # made so far, of each sample

    @classmethod
    def for_samples(cls, seed: int, samples: torch.Tensor, device: torch.device | str | None = None) -> Self:
        """The streams of `samples` (B,) int64 (positions in a run, or the pictures' own seeds) under one `seed`."""
        samples = samples.to(device=device, dtype=torch.int64)
        return cls(_mix(_mix(samples + _GOLDEN) ^ tag_key(f"seed {seed}")))

    def child(self, tag: str) -> SampleGenerator:
        """An independent stream for each sample, named by `tag`, which does not depend on draws made here."""
        return SampleGenerator(_mix(self.keys ^ tag_key(tag)))

    def select(self, rows: torch.Tensor) -> SampleGenerator:
        """The streams of the samples `rows` (n,) int64, going on from the draws made so far."""
        selected = SampleGenerator(self.keys[rows])
        selected._draws = self._draws[rows]
        return selected

    def cat(self, other: SampleGenerator) -> SampleGenerator:
        """The streams of this one, then those of `other`, each going on from the draws made so far."""
        both = SampleGenerator(torch.cat([self.keys, other.keys]))
        both._draws = torch.cat([self._draws, other._draws])
        return both

    def normal(self, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """(B, *shape) float32, standard normal (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        bits = self._bits(half)
        # 32 bits each: a radius in (0, 1] with 2^-32 as its least value (up to 6.7 standard deviations), and an angle.
        radius = (bits >> 32).bitwise_and_(0xFFFFFFFF).to(torch.float32).add_(1.0).mul_(2.0**-32)
        angle = bits.bitwise_and_(0xFFFFFFFF).to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
        radius = radius.clamp_(max=1.0).log_().mul_(-2.0).sqrt_()
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(self.keys.shape[0], *shape)

    def uniform(self, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """(B, *shape) float32 in [0, 1)."""
        bits = self._bits(math.prod(shape))
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).reshape(self.keys.shape[0], *shape)

    def integers(self, high: int) -> torch.Tensor:
        """(B,) int64 in [0, high); the bias of at most high / 2^62 is below anything that could be measured."""
        if high < 1:
            raise ValueError(f"high must be at least 1, not {high}")
        return ((self._bits(1)[:, 0] >> 1) & 0x3FFFFFFFFFFFFFFF) % high

    def _bits(self, count: int) -> torch.Tensor:
        """(B, count) int64 of 64 random bits."""
        self._draws = self._draws + 1
        stream = _mix(self.keys + self._draws * _GOLDEN)
        counters = torch.arange(1, count + 1, dtype=torch.int64, device=self.keys.device) * _GOLDEN
        return _mix_(stream[:, None] + counters[None, :])


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The SplitMix64 finaliser on int64 with wrap-around."""
    return _mix_(x.clone())


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """`_mix` in place; the masks make the arithmetic shifts logical."""
    x.bitwise_xor_((x >> 30).bitwise_and_(0x3FFFFFFFF)).mul_(_MIX_1)
    x.bitwise_xor_((x >> 27).bitwise_and_(0x1FFFFFFFFF)).mul_(_MIX_2)
    return x.bitwise_xor_((x >> 31).bitwise_and_(0x1FFFFFFFF))
