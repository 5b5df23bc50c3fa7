"""A manipulation's job: everything checked before any weights are loaded, then its pictures and their sheet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from unclip.config.base import ConfigError
from unclip.generation.device import DTYPES, chosen_device
from unclip.generation.manipulations import ManipulationConfig
from unclip.generation.pictures import Originals
from unclip.generation.sheets import SheetFolder
from unclip.models.clip import Tokenizer
from unclip.models.text import caption_mask
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import Cascade, plan_cascade
from unclip.pipelines.guides import check_label
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_ROOM = 2002
"""Tokens that a caption is read with to count them: more than any network takes."""
_NOT_IN_PICTURES = ("bundle", "out", "device", "options")
"""Fields that pictures do not depend on, or that the bundle's digest and the cascade's settings say better."""


@dataclass(frozen=True)
class ManipulationJob:
    """A manipulation whose inputs were all found right; what is in `folder` is kept."""

    config: ManipulationConfig
    bundle: Bundle
    cascade: Cascade
    device: torch.device
    given: Originals
    folder: SheetFolder
    is_finished: bool

    @classmethod
    def prepare(cls, config: ManipulationConfig) -> ManipulationJob:
        """Checks everything that can be checked without weights.

        Raises `ConfigError` for a bad field, picture or caption, and where `out` holds pictures of something else,
        `BundleError` for a bad bundle, `OSError` where `out` cannot be written.
        """
        for name in ("bundle", "out"):
            if not getattr(config, name):
                raise ConfigError(f"{name}: required, but not given")
        device, bundle = chosen_device(config.device), Bundle.load(config.bundle)
        cascade = plan_cascade(bundle.configs, config.drawn_with, with_prior=config.with_prior)
        config.check(bundle)
        for field, captions in config.captions.items():
            check_captions(field, captions, cascade)
        given = config.read(max(cascade.sizes.values()))
        storage.check_writable(config.out)
        about = {
            "bundle": bundle.digest,
            "inputs": {"pictures": digest_of(given)} | config.inputs,
            "settings": {key: value for key, value in config.to_dict().items() if key not in _NOT_IN_PICTURES}
            | cascade.settings,
        }
        folder = SheetFolder(config.out, about, bundle.attribution)
        return cls(config, bundle, cascade, device, given, folder, folder.is_finished())

    def run(self) -> str:
        """Makes the pictures and the sheet unless they are there; returns the sheet's address."""
        config = self.config
        if self.is_finished:
            return self.folder.sheet
        pipeline = Pipeline.from_bundle(
            self.bundle,
            self.device,
            dtype=DTYPES[config.precision],
            options=config.drawn_with,
            with_prior=config.with_prior,
        )
        with progress_bar(0, "step") as bar:
            sheet = config.sheet(pipeline, self.given, _Steps(bar))
        return self.folder.write(sheet)


class _Steps:
    """Sampling steps on a bar whose total grows with every stage that begins."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def __call__(self, stage: str, done: int, steps: int) -> None:
        if done == 1:
            self._bar.total = (self._bar.total or 0) + steps
        self._bar.set_postfix_str(stage, refresh=False)
        self._bar.update()


def digest_of(given: Originals) -> str:
    """SHA-256 of the pictures."""
    return hashlib.sha256(repr(given.pictures.shape).encode() + given.pictures.tobytes()).hexdigest()


def check_captions(field: str, captions: Sequence[str], cascade: Cascade) -> None:
    """Raises `ConfigError` naming the first caption that is empty, no class, or longer than what the networks read."""
    for caption in captions:
        if not caption.strip():
            raise ConfigError(f"{field}: a caption is empty")
        if cascade.classes:
            check_label(field, caption, cascade.classes)
        count = int(caption_mask(torch.from_numpy(Tokenizer(None)([caption], _ROOM))).sum())
        if count > cascade.context_length:
            raise ConfigError(
                f"{field} = {caption[:60]!r}: {count} tokens with start and end; the networks read {cascade.context_length}"
            )
