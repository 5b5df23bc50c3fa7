"""Conversions: sources of other libraries to bundles of ours or settings for our jobs, and bundles to folders of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from unclip.config.base import Config, ConfigError
from unclip.interop.base import ImportedStage, Source
from unclip.interop.dalle2_pytorch import convert_settings
from unclip.interop.diffusers.exporting import export_bundle
from unclip.interop.keys import Account
from unclip.interop.registry import IMPORTERS
from unclip.pipelines.bundle import Bundle, check_clip, save_stage
from unclip.pipelines.card import write_card
from unclip.pipelines.clips import absolute_clip
from unclip.utils import storage

_TAKES_FLAGS = ("adm",)
_SETTINGS = "dalle2_pytorch"
"""Of which there are configurations to take over, and no weights."""


class ConvertConfig(Config):
    """One conversion."""

    source: str = ""
    """What is converted: a file or folder of another library, or with `to` a bundle of ours; required."""
    kind: str | None = None
    """What the source is: diffusers, hf_clip, karlo, glide, adm or dalle2_pytorch; null for a bundle of ours."""
    to: Literal["diffusers"] | None = None
    """What a bundle is converted to; null: the source becomes a bundle."""
    out: str = ""
    """What is made: a bundle (local or `s3://`), a folder of diffusers (local), or with dalle2_pytorch a YAML file; required."""
    clip: str | None = None
    """CLIP of sources that do not bring theirs: what `load_clip` takes, as ViT-L-14-quickgelu/openai."""
    flags: str = ""
    """For kind adm: settings that the weights do not tell, as guided-diffusion's scripts take them."""

    @model_validator(mode="after")
    def _check(self) -> ConvertConfig:
        kinds = (*IMPORTERS, _SETTINGS)
        if self.kind is not None and self.kind not in kinds:
            raise ValueError(f"kind = {self.kind!r}: must be one of {', '.join(kinds)}")
        if self.kind is not None and self.to is not None:
            raise ValueError(f"to = {self.to!r}: is for bundles of ours, and kind = {self.kind!r} for other sources")
        if self.flags and self.kind not in _TAKES_FLAGS:
            raise ValueError(f"flags: is a setting of kind {', '.join(_TAKES_FLAGS)}, not of {self.kind}")
        return self


def run_convert(config: ConvertConfig, *, dry_run: bool = False) -> Iterator[Account]:
    """Converts, and yields what became of the tensors of each part; a dry run checks the same and writes nothing.

    Stages of a bundle that are there already are replaced. Raises `InteropError` naming what cannot be taken over,
    `ConfigError` where something is not given or not there, and `BundleError` where a bundle is refused.
    """
    for name in ("source", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: required, but not given")
    if config.kind is None and config.to is None:
        raise ConfigError("kind: required for sources of other libraries; bundles are converted `to` something")
    return (
        _exported(config, dry_run=dry_run) if config.kind is None else _imported(config, config.kind, dry_run=dry_run)
    )


def _exported(config: ConvertConfig, *, dry_run: bool) -> Iterator[Account]:
    bundle = Bundle.load(config.source)
    if not storage.is_local(config.out):
        raise ConfigError(f"out = {config.out!r}: must be a local folder")
    yield from export_bundle(bundle, Path(config.out), dry_run=dry_run)


def _imported(config: ConvertConfig, kind: str, *, dry_run: bool) -> Iterator[Account]:
    if not Path(config.source).exists():
        raise ConfigError(f"source = {config.source!r}: is not there")
    if kind == _SETTINGS:
        yield convert_settings(config.source, config.out, dry_run=dry_run)
        return
    if not dry_run:
        storage.check_writable(config.out)
    clip = None if config.clip is None else absolute_clip(config.clip)
    for stage in IMPORTERS[kind](Source(config.source, clip, config.flags)):
        if dry_run:
            check_clip(config.out, stage.config.kind, stage.clip)
        else:
            provenance = _provenance(config, stage)
            save_stage(config.out, stage.config, tensors=stage.tensors, clip=stage.clip, provenance=provenance)
        yield from stage.accounts
    if not dry_run:
        write_card(config.out)


def _provenance(config: ConvertConfig, stage: ImportedStage) -> dict[str, Any]:
    return {
        "source": f"{config.source} ({config.kind})",
        "conversion": [account.to_dict() for account in stage.accounts],
        "dropped": {name: reason for account in stage.accounts for name, reason in account.dropped.items()},
    }
