"""The kinds of figures that the unCLIP paper shows, made of any bundle; what a bundle cannot do is said and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.generation.components import Components, check_counts, fit_components, has_components, load_components
from unclip.generation.device import chosen_device
from unclip.generation.manipulate import check_captions, digest_of
from unclip.generation.manipulations import (
    AblatePriorConfig,
    InterpolateConfig,
    ManipulationConfig,
    ProbeConfig,
    TextDiffConfig,
    VariationsConfig,
    check_told_image_embed,
)
from unclip.generation.pictures import Originals, read_originals
from unclip.generation.sheets import Sheet, SheetFolder, cells_of
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import Cascade, GenerationOptions, plan_cascade
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage
from unclip.utils.hashing import sha256_file

M = TypeVar("M", bound=ManipulationConfig)

_PROMPTS = ("a red heart", "a green circle", "the flag of Spain", "a yellow circle")
_SAMPLES_TAKEN = 3
"""Samples that are manipulated where no pictures are given."""
_DRAWS = 64
"""Embeddings that the prior draws where principal components have to come from it."""


class FiguresConfig(Config):
    """Which bundle, and what its figures show."""

    bundle: str
    """Folder or s3:// address of the trained bundle."""
    out: str = "figures"
    """Folder or s3:// address; a folder in it for each figure."""
    prompts: tuple[str, ...] = ()
    """Captions of the samples, two at least; none for a few simple ones, or for a decoder's first classes."""
    pictures: tuple[str, ...] = ()
    """Pictures to manipulate, two at least; none for samples of the first prompts."""
    components: str | None = None
    """pca.safetensors that jobs/embed.py writes; none for those of the prior: its own or, of a diffusion prior, its draws'."""
    up_to: int | None = Field(None, ge=1)
    """Side in pixels of the largest picture wanted; none for all stages of the bundle."""
    count: int = Field(4, ge=2, le=16)
    """Samples and variations of each prompt and picture."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of the noise."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the networks run; auto takes a CUDA device where there is one."""


@dataclass(frozen=True)
class Figures:
    """Figures whose inputs were all found right; `given` are pictures from outside, `folders` where each figure lies."""

    config: FiguresConfig
    bundle: Bundle
    device: torch.device
    options: GenerationOptions
    given: Originals | None
    folders: Mapping[str, SheetFolder]

    @classmethod
    def prepare(cls, config: FiguresConfig) -> Figures:
        """Checks everything that can be checked without weights.

        Raises `ConfigError` for a bad field, caption or picture, and where `out` holds other figures, `BundleError` for a
        bad bundle, `OSError` where `out` cannot be written.
        """
        bundle, options = Bundle.load(config.bundle), GenerationOptions(up_to=config.up_to)
        cascade = plan_cascade(bundle.configs, options)
        prompts = config.prompts or cascade.classes[: len(_PROMPTS)] or _PROMPTS
        config = config.merged({"prompts": list(prompts)})
        if len(prompts) < 2 or len(config.pictures) == 1:
            raise ConfigError(f"prompts: {len(prompts)}, pictures: {len(config.pictures)}; at least 2 of each")
        check_captions("prompts", prompts, cascade)
        if config.components is not None:
            check_counts(bundle, config.components, ())
        side = max(cascade.sizes.values())
        given = read_originals("pictures", config.pictures, side) if config.pictures else None
        storage.check_writable(config.out)
        about = _about(config, bundle, cascade, given)
        folders = {
            name: SheetFolder(storage.join(config.out, name), about, bundle.attribution) for name in cls.makers()
        }
        for folder in folders.values():
            folder.is_finished()  # refuses one of other figures
        return cls(config, bundle, chosen_device(config.device), options, given, folders)

    @classmethod
    def makers(cls) -> dict[str, Callable[[Figures], Sheet]]:
        """What makes each figure."""
        return {
            "samples": lambda figures: figures._samples,
            "variations": cls._variations,
            "interpolations": cls._interpolations,
            "text_diffs": cls._text_diffs,
            "probing": cls._probing,
            "prior_ablation": cls._prior_ablation,
        }

    def run(self) -> Iterator[str]:
        """A line for each figure: where its sheet is, or why there is none. Finished ones are not made again."""
        for name, make in self.makers().items():
            folder = self.folders[name]
            try:
                if name != "samples":
                    check_told_image_embed(self.bundle)
                yield f"{name}: {folder.sheet if folder.is_finished() else folder.write(make(self))}"
            except (ConfigError, BundleError) as error:
                yield f"{name}: left out: {error}"

    @cached_property
    def _pipeline(self) -> Pipeline:
        return Pipeline.from_bundle(self.bundle, self.device, options=self.options)

    @cached_property
    def _samples(self) -> Sheet:
        config = self.config
        seeds = list(range(config.seed, config.seed + config.count))
        rows = []
        for prompt in config.prompts:
            output = self._pipeline([prompt] * config.count, seeds, options=self.options)
            rows.append((prompt, cells_of(output)))
        return Sheet([f"seed {seed}" for seed in seeds], rows)

    @cached_property
    def _originals(self) -> Originals:
        if self.given is not None:
            return self.given
        rows = self._samples.rows[:_SAMPLES_TAKEN]
        return Originals(np.stack([cells[0].largest for _, cells in rows]), [prompt for prompt, _ in rows])

    def _variations(self) -> Sheet:
        return self._configured(VariationsConfig, count=self.config.count).sheet(self._pipeline, self._originals)

    def _interpolations(self) -> Sheet:
        return self._configured(InterpolateConfig).sheet(self._pipeline, self._originals)

    def _text_diffs(self) -> Sheet:
        """Each picture towards the caption of the next; from its own caption where it is a sample, else from a dummy."""
        sheets, prompts, given = [], self.config.prompts, self._originals
        for index, name in enumerate(given.names):
            changes = {"target": prompts[(index + 1) % len(prompts)]}
            if self.given is None:  # then its name is the caption that it was drawn from
                changes["source"], name = name, ""
            config = self._configured(TextDiffConfig, **changes)
            sheets.append(config.sheet(self._pipeline, Originals(given.pictures[index : index + 1], [name])))
        return Sheet(sheets[0].columns, [row for sheet in sheets for row in sheet.rows])

    def _probing(self) -> Sheet:
        config = self._configured(ProbeConfig, components=self.config.components)
        return config.sheet_of(self._components(), self._pipeline, self._originals)

    def _prior_ablation(self) -> Sheet:
        config = self._configured(AblatePriorConfig, prompts=list(self.config.prompts))
        return config.sheet(self._pipeline, self._originals)

    def _components(self) -> Components:
        if self.config.components is not None or has_components(self.bundle):
            return load_components(self.bundle, self.config.components)
        prompts: Sequence[str] = [self.config.prompts[index % len(self.config.prompts)] for index in range(_DRAWS)]
        drawn = self._pipeline.draw(range(_DRAWS), options=self.options).prior(prompts)
        return fit_components(drawn, f"components of {_DRAWS} draws of the prior")

    def _configured(self, manipulation: type[M], **changes: object) -> M:
        settings = {"bundle": self.config.bundle, "options": self.options.to_dict(), "seed": self.config.seed}
        return manipulation.from_dict({**settings, **changes})


def _about(config: FiguresConfig, bundle: Bundle, cascade: Cascade, given: Originals | None) -> dict[str, object]:
    """All that decides what is on the figures."""
    inputs = {} if given is None else {"pictures": digest_of(given)}
    if config.components is not None:
        inputs["components"] = sha256_file(config.components)
    settings = {key: value for key, value in config.to_dict().items() if key not in ("bundle", "out", "device")}
    return {"bundle": bundle.digest, "inputs": inputs, "settings": settings | cascade.settings}
