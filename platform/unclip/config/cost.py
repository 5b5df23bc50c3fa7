"""What an hour costs, as far as a user knows it."""

from __future__ import annotations

from pydantic import Field

from unclip.config.base import Config


class CostConfig(Config):
    """Prices that a job's hours are counted at, in US dollars. They change what is said, not what is done."""

    gpu_hour: float | None = Field(default=None, ge=0)
    """Of a GPU; none: what its kind cost about in 2025, which is said to be a guess."""
    cpu_hour: float | None = Field(default=None, ge=0)
    """Of a CPU; none: CPUs are counted in hours only."""
    budget: float | None = Field(default=None, gt=0)
    """Of the whole job. Beyond it operators are alerted (docs/monitoring.md); the job goes on."""
