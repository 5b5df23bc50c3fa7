"""The generation job: from a configuration to a folder of pictures and a grid. Running it again continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL import UnidentifiedImageError
from tqdm import tqdm

from unclip.generation.device import DTYPES, chosen_device
from unclip.generation.outputs import captioned_grid, read_png, read_png_metadata, write_grid, write_png
from unclip.generation.requests import GenerateConfig, Request, check_prompts, plan
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import Cascade, plan_cascade
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage
from unclip.utils.progress import progress_bar


@dataclass(frozen=True)
class GenerationJob:
    """A generation whose inputs were all found right."""

    config: GenerateConfig
    bundle: Bundle
    cascade: Cascade
    requests: Sequence[Request]
    device: torch.device

    @classmethod
    def prepare(cls, config: GenerateConfig) -> GenerationJob:
        """Checks everything that can be checked without weights.

        Raises `ConfigError` for a bad field or prompt, `BundleError` for a bad bundle, `OSError` where `out` cannot be
        written.
        """
        requests = plan(config)
        device = chosen_device(config.device)
        bundle = Bundle.load(config.bundle)
        cascade = plan_cascade(bundle.configs, config.options)
        check_prompts(config, requests, cascade)
        storage.check_writable(config.out)
        return cls(config=config, bundle=bundle, cascade=cascade, requests=requests, device=device)

    def run(self) -> str:
        """Makes every picture that is not there yet, then the grid; returns the grid's address."""
        missing = [request for request in self.requests if not self._is_finished(request)]
        if missing:
            self._make(missing)
        grid = storage.join(self.config.out, "grid.png")
        self._write_grid(grid)
        return grid

    def _make(self, requests: Sequence[Request]) -> None:
        config = self.config
        pipeline = Pipeline.from_bundle(
            self.bundle, self.device, dtype=DTYPES[config.precision], options=config.options
        )
        total, there = len(self.requests), len(self.requests) - len(requests)
        with progress_bar(total, "image", done=there) as bar:
            for batch in _batches(requests, config.batch_size):
                output = pipeline(
                    [request.prompt for request in batch],
                    [request.seed for request in batch],
                    options=config.options,
                    progress=partial(_show, bar),
                )
                for size, pictures in output.images.items():
                    for request, picture in zip(batch, pictures, strict=True):
                        write_png(picture, self.picture_uri(size, request), self._metadata(request))
                bar.update(len(batch))

    def _write_grid(self, uri: str) -> None:
        sizes = list(self.cascade.sizes.values())
        shown = self.requests[: self.config.grid_rows]
        rows = [(request.prompt, [read_png(self.picture_uri(size, request)) for size in sizes]) for request in shown]
        write_grid(captioned_grid(rows, [f"{size} px" for size in sizes]), uri)

    def _is_finished(self, request: Request) -> bool:
        """True where every size is there and was made from this prompt, with this bundle and these settings."""
        expected = self._metadata(request).items()
        for size in self.cascade.sizes.values():
            try:
                found = read_png_metadata(self.picture_uri(size, request))
            except (FileNotFoundError, UnidentifiedImageError):
                return False
            if not expected <= found.items():
                return False
        return True

    def picture_uri(self, size: int, request: Request) -> str:
        """Where the picture of `size` pixels for `request` lies."""
        return storage.join(self.config.out, str(size), request.name)

    def _metadata(self, request: Request) -> dict[str, str]:
        return {"prompt": request.prompt, "seed": str(request.seed), **self._origin}

    @cached_property
    def _origin(self) -> dict[str, str]:
        """What every picture of the job has in common: hash of the bundle and the settings."""
        settings = {"precision": self.config.precision, **self.cascade.settings}
        return {"bundle": self.bundle.digest, "settings": json.dumps(settings, sort_keys=True)}


def _show(bar: tqdm[Any], stage: str, done: int, steps: int) -> None:
    bar.set_postfix_str(f"{stage} {done}/{steps}", refresh=False)
    bar.update(0)  # redrawn when it is due


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
