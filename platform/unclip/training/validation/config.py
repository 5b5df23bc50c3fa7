"""What is looked at while a run trains, and how often."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from unclip.config.base import Config

MAX_ROWS = 8
"""Rows of a sample grid: enough to see a run get better, few enough to be drawn every few thousand steps."""


class ValidationConfig(Config):
    """Held-out loss, scores and sample grids of the moving average, made beside the training without stopping it."""

    every_steps: int | None = Field(default=None, gt=0)
    """Steps between two validations; a checkpoint is saved at each. None: no validation."""
    data: str | None = None
    """Folder of held-out records, with the columns of the training data, local or `s3://`; none, which only a decoder with
    prompts can do with: sample grids alone."""
    samples: int = Field(default=256, gt=0)
    """Held-out records of each validation: always the folder's first ones."""
    rows: int = Field(default=6, ge=1, le=MAX_ROWS)
    """Rows of the sample grid, where they are held-out records; also the pictures that are scored."""
    prompts: tuple[str, ...] = Field(default=(), max_length=MAX_ROWS)
    """Captions, or names of classes, of a decoder's sample grid; none: those of the first held-out records."""
    seed: int = Field(default=0, ge=0)
    """Seeds noise and timesteps of the held-out loss, and the sample grid: the same at every validation."""
    label_column: str | None = Field(default=None, min_length=1)
    """For CLIP: a column of the held-out records whose values are told apart zero-shot."""
    label_prompt: str = "{}"
    """For CLIP: the caption that stands for a label, with `{}` in its place, as in `a photo of a {}`."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs reserved for it, on which it computes with as many threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs reserved for it; 0 validates on the CPU."""
    wait_s: float = Field(default=1800.0, ge=0)
    """Longest wait, when training has ended, for the validation of the last checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_prompt.count("{}") != 1:
            raise ValueError(f"label_prompt = {self.label_prompt!r}: must hold {{}} once, where the label goes")
        return self
