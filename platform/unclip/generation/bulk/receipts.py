"""What is known of a unit that is done: its receipt, which is written after everything else of it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from unclip.config.base import Config


class StoredFile(Config):
    """A file that was written whole."""

    file: str
    """Its name in its folder."""
    rows: int = Field(ge=0)
    """Pictures, or refused rows, in it."""
    bytes: int = Field(ge=0)
    """Size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the content."""
    row_groups: tuple[int, ...] = ()
    """Rows of each row group; none in a tar."""


class Receipt(Config):
    """The content of OUT/_units/UNIT.json."""

    unit: int = Field(ge=0)
    """Its number."""
    rows: int = Field(ge=1)
    """Prompts."""
    done: int = Field(ge=0)
    """Of these, how many have all their pictures."""
    quarantined: dict[str, int] = Field(default_factory=dict)
    """Of these, how many have none, by reason."""
    pictures: int = Field(ge=0)
    """That were kept."""
    candidates: int = Field(ge=0)
    """That were made for them; more where the best of several were kept."""
    seconds: float = Field(ge=0)
    """From the unit's beginning to its end, of the attempt that ended."""
    shard: StoredFile | None = None
    """The pictures, in formats of shards; none where there are none."""
    files: dict[str, int] = Field(default_factory=dict)
    """SIZE/NAME.png and bytes of each picture, in format folder."""
    quarantine: StoredFile | None = None
    """The rows without pictures; none where there are none."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        refused = sum(self.quarantined.values())
        if self.done + refused != self.rows:
            raise ValueError(f"{self.done} prompts done and {refused} quarantined are not the {self.rows} of the unit")
        if (self.quarantine.rows if self.quarantine else 0) != refused:
            raise ValueError(f"its quarantine does not have the {refused} prompts that were")
        if self.shard is not None and self.shard.rows != self.pictures:
            raise ValueError(f"its shard has {self.shard.rows} pictures for {self.pictures}")
        if self.pictures and self.shard is None and not self.files:
            raise ValueError(f"nothing holds its {self.pictures} pictures")
        return self


def shard_name(unit: int, suffix: str) -> str:
    """Of a unit's pictures."""
    return f"data-{unit:05d}.{suffix}"


def quarantine_name(unit: int) -> str:
    """Of a unit's rows without pictures."""
    return f"part-{unit:05d}.parquet"


def receipt_name(unit: int) -> str:
    """Of a unit's receipt."""
    return f"{unit:05d}.json"
