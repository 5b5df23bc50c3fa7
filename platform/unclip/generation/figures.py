"""The kinds of figures that the unCLIP paper shows, made of any bundle; what a bundle cannot do is said and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.generation.components import Components, fit_components, load_components
from unclip.generation.device import chosen_device
from unclip.generation.manipulate import check_captions
from unclip.generation.manipulations import (
    AblatePriorConfig,
    InterpolateConfig,
    TextDiffConfig,
    VariationsConfig,
    beside,
    grouped,
)
from unclip.generation.pictures import read_square
from unclip.generation.sheets import Sheet, cells_of
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import GenerationOptions, plan_cascade
from unclip.pipelines.manipulations.probing import probing
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage

_DRAWS = 64
"""Embeddings that the prior draws where principal components have to come from it."""


class FiguresConfig(Config):
    """Which bundle, and what its figures show."""

    bundle: str
    """Folder or s3:// address of the trained bundle."""
    out: str = "figures"
    """Folder or s3:// address; a folder in it for each figure."""
    prompts: tuple[str, ...] = ("a red heart", "a green circle", "the flag of Spain", "a yellow circle")
    """Captions of the samples; two at least."""
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
    """Figures whose inputs were all found right; `given` (N, S, S, 3) are the pictures from outside."""

    config: FiguresConfig
    bundle: Bundle
    device: torch.device
    options: GenerationOptions
    given: npt.NDArray[np.uint8] | None

    @classmethod
    def prepare(cls, config: FiguresConfig) -> Figures:
        """Checks everything that can be checked without weights.

        Raises `ConfigError` for a bad field, caption or picture, `BundleError` for a bad bundle, `OSError` where `out`
        cannot be written.
        """
        bundle, options = Bundle.load(config.bundle), GenerationOptions(up_to=config.up_to)
        cascade = plan_cascade(bundle.configs, options)
        if len(config.prompts) < 2 or len(config.pictures) == 1:
            raise ConfigError(f"prompts: {len(config.prompts)}, pictures: {len(config.pictures)}; at least 2 of each")
        if not cascade.classes:
            check_captions("prompts", config.prompts, cascade)
        if config.components is not None:
            load_components(bundle, config.components)
        side, given = max(cascade.sizes.values()), None
        if config.pictures:
            given = np.stack([read_square("pictures", uri, side) for uri in config.pictures])
        storage.check_writable(config.out)
        return cls(config, bundle, chosen_device(config.device), options, given)

    def run(self) -> Iterator[str]:
        """A line for each figure: where its sheet is, or why there is none."""
        pipeline = Pipeline.from_bundle(self.bundle, self.device, options=self.options)
        samples = self._samples(pipeline)
        yield self._write("samples", samples)
        own = np.stack([cells[0].largest for _, cells in samples.rows[:3]])
        pictures = own if self.given is None else self.given
        figures: dict[str, Callable[[], Sheet]] = {
            "variations": lambda: VariationsConfig.from_dict(self._plain() | {"count": self.config.count}).sheet(
                pipeline, pictures
            ),
            "interpolations": lambda: InterpolateConfig.from_dict(self._plain()).sheet(pipeline, pictures),
            "text_diffs": lambda: self._text_diffs(pipeline, pictures),
            "probing": lambda: self._probing(pipeline, pictures),
            "prior_ablation": lambda: AblatePriorConfig.from_dict(
                self._plain() | {"prompts": list(self.config.prompts)}
            ).sheet(pipeline, pictures),
        }
        for name, make in figures.items():
            try:
                if not pipeline.decoder.config.model.embed_dim:
                    raise ConfigError("the decoder is told no image embedding")
                yield self._write(name, make())
            except (ConfigError, BundleError) as error:
                yield f"{name}: left out: {error}"

    def _samples(self, pipeline: Pipeline) -> Sheet:
        config = self.config
        seeds = list(range(config.seed, config.seed + config.count))
        rows = []
        for prompt in config.prompts:
            output = pipeline([prompt] * config.count, seeds, options=self.options)
            rows.append((prompt, cells_of(output)))
        return Sheet([f"seed {seed}" for seed in seeds], rows)

    def _text_diffs(self, pipeline: Pipeline, pictures: npt.NDArray[np.uint8]) -> Sheet:
        """Each picture towards the caption of the next; from its own caption where it is a sample, else from a dummy."""
        sheets = []
        for index, picture in enumerate(pictures):
            target = self.config.prompts[(index + 1) % len(self.config.prompts)]
            changes = {"source": self.config.prompts[index]} if self.given is None else {}
            config = TextDiffConfig.from_dict(self._plain() | {"target": target} | changes)
            sheets.append(config.sheet(pipeline, picture[None]))
        return Sheet(sheets[0].columns, [row for sheet in sheets for row in sheet.rows])

    def _probing(self, pipeline: Pipeline, pictures: npt.NDArray[np.uint8]) -> Sheet:
        found = self._components(pipeline)
        counts = found.counts(())
        output = probing(
            pipeline,
            pipeline.encode_image(pictures),
            mean=found.mean,
            components=found.components,
            counts=counts,
            seed=self.config.seed,
            options=self.options,
        )
        return beside(pictures, ["picture", *map(str, counts)], grouped(cells_of(output), len(counts)), found.origin)

    def _components(self, pipeline: Pipeline) -> Components:
        try:
            return load_components(self.bundle, self.config.components)
        except ConfigError:
            prompts: Sequence[str] = self.config.prompts
            prompts = [prompts[index % len(prompts)] for index in range(_DRAWS)]
            drawn = pipeline.draw(range(_DRAWS), options=self.options).prior(prompts)
            return fit_components(drawn, f"components of {_DRAWS} draws of the prior")

    def _plain(self) -> dict[str, object]:
        return {"bundle": self.config.bundle, "options": self.options.to_dict(), "seed": self.config.seed}

    def _write(self, name: str, sheet: Sheet) -> str:
        settings = self.config.to_dict()
        uri = sheet.write(storage.join(self.config.out, name), {"bundle": self.bundle.digest, "settings": settings})
        return f"{name}: {uri}"
