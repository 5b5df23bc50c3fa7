"""Bounds of an engine."""

from __future__ import annotations

from pydantic import Field

from unclip.config.base import Config


class RowLimits(Config):
    """Most rows of each stage at once, where memory allows as many: beyond them a step gains nothing but length."""

    prior: int = Field(128, ge=1)
    """Draws of image embeddings."""
    decoder: int = Field(32, ge=1)
    """Pictures of the decoder."""
    upsampler_256: int = Field(8, ge=1)
    """Pictures of the first upsampler."""
    upsampler_1024: int = Field(2, ge=1)
    """Pictures of the second upsampler, one of which fills most devices."""


class EngineConfig(Config):
    """Bounds of an engine."""

    rows: RowLimits = RowLimits()
    """Most rows of each stage at once."""
    memory_bytes: int | None = Field(None, ge=1)
    """What all stages together may take beyond their weights; null for memory_share of what is free."""
    memory_share: float = Field(0.8, gt=0, le=1)
    """Share of the memory that is free when the engine is made."""
    compile: bool = False
    """Compiles the networks for few numbers of rows, and pads batches to these. It pays where a process lives for long:
    each number of rows takes a stage seconds to minutes to compile."""
