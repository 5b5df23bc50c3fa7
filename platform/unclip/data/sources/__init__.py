"""Where pictures and captions come from: Parquet, tars, folders and lists of addresses, all as tables of one form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from unclip.data.sources.base import RAW_SCHEMA, READ_ROWS, Part, Source
from unclip.data.sources.fetch import FetchPolicy
from unclip.data.sources.folder import FolderSourceConfig
from unclip.data.sources.parquet import ParquetSourceConfig
from unclip.data.sources.urls import UrlSourceConfig
from unclip.data.sources.webdataset import WebDatasetSourceConfig

__all__ = [
    "RAW_SCHEMA",
    "READ_ROWS",
    "FetchPolicy",
    "FolderSourceConfig",
    "ParquetSourceConfig",
    "Part",
    "Source",
    "SourceConfig",
    "UrlSourceConfig",
    "WebDatasetSourceConfig",
]

SourceConfig = Annotated[
    ParquetSourceConfig | WebDatasetSourceConfig | FolderSourceConfig | UrlSourceConfig, Field(discriminator="kind")
]
"""Configuration of a source, chosen by `kind`; its `build()` gives the `Source`."""
