"""A manipulation's job: everything checked before any weights are loaded, then its pictures and their sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from unclip.config.base import ConfigError
from unclip.generation.device import DTYPES, chosen_device
from unclip.generation.manipulations import ManipulationConfig
from unclip.generation.sheets import Sheet
from unclip.models.clip import Tokenizer
from unclip.models.text import caption_mask
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import Cascade, plan_cascade
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_ROOM = 2002
"""Tokens that a caption is read with to count them: more than any network takes."""


@dataclass(frozen=True)
class ManipulationJob:
    """A manipulation whose inputs were all found right; `pictures` (N, S, S, 3) are what it begins with."""

    config: ManipulationConfig
    bundle: Bundle
    cascade: Cascade
    device: torch.device
    pictures: npt.NDArray[np.uint8]

    @classmethod
    def prepare(cls, config: ManipulationConfig) -> ManipulationJob:
        """Checks everything that can be checked without weights.

        Raises `ConfigError` for a bad field, picture or caption, `BundleError` for a bad bundle, `OSError` where `out`
        cannot be written.
        """
        for name in ("bundle", "out"):
            if not getattr(config, name):
                raise ConfigError(f"{name}: required, but not given")
        device, bundle = chosen_device(config.device), Bundle.load(config.bundle)
        cascade = plan_cascade(bundle.configs, config.options, with_prior=config.with_prior)
        for field, captions in config.captions.items():
            check_captions(field, captions, cascade)
        config.check(bundle)
        pictures = config.read(max(cascade.sizes.values()))
        storage.check_writable(config.out)
        return cls(config, bundle, cascade, device, pictures)

    def run(self) -> str:
        """Makes the pictures and the sheet; returns the sheet's address."""
        config = self.config
        pipeline = Pipeline.from_bundle(
            self.bundle,
            self.device,
            dtype=DTYPES[config.precision],
            options=config.options,
            with_prior=config.with_prior,
        )
        with progress_bar(0, "step") as bar:
            sheet = config.sheet(pipeline, self.pictures, _Steps(bar))
        return self.write(sheet)

    def write(self, sheet: Sheet) -> str:
        """Writes pictures and sheet with what made them; returns the sheet's address."""
        settings = {key: value for key, value in self.config.to_dict().items() if key not in ("out", "bundle")}
        return sheet.write(self.config.out, {"bundle": self.bundle.digest, "settings": settings})


class _Steps:
    """Sampling steps on a bar whose total grows with every stage that begins."""

    def __init__(self, bar: tqdm[object]) -> None:
        self._bar = bar

    def __call__(self, stage: str, done: int, steps: int) -> None:
        if done == 1:
            self._bar.total = (self._bar.total or 0) + steps
        self._bar.set_postfix_str(stage, refresh=False)
        self._bar.update()


def check_captions(field: str, captions: Sequence[str], cascade: Cascade) -> None:
    """Raises `ConfigError` naming the first caption that is empty, or that a network would see only the beginning of."""
    for caption in captions:
        if not caption.strip():
            raise ConfigError(f"{field}: a caption is empty")
        count = int(caption_mask(torch.from_numpy(Tokenizer(None)([caption], _ROOM))).sum())
        if count > cascade.context_length:
            raise ConfigError(
                f"{field} = {caption[:60]!r}: {count} tokens with start and end; the networks read {cascade.context_length}"
            )
