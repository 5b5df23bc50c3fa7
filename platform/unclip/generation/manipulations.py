"""The manipulations as jobs: what each may be asked for, and the sheet it makes of a pipeline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from unclip.config.base import Config, ConfigError
from unclip.data.decode import Picture
from unclip.data.transforms import resize_square
from unclip.generation.components import Components, check_counts, load_components
from unclip.generation.pictures import Originals, read_keep, read_originals, read_picture
from unclip.generation.sheets import Cell, Sheet, cells_of, from_outside
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.inversion import deterministic, invert
from unclip.pipelines.manipulations.inpainting import FEATHER, Place, inpainting, on_canvas
from unclip.pipelines.manipulations.interpolation import NoiseName, interpolation
from unclip.pipelines.manipulations.prior_ablation import prior_ablation
from unclip.pipelines.manipulations.probing import probing
from unclip.pipelines.manipulations.text_diff import DUMMY_CAPTION, MAX_THETA, text_diff, thetas
from unclip.pipelines.manipulations.variations import redrawn
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStageConfig
from unclip.utils.hashing import sha256_file


class ManipulationConfig(Config):
    """What all manipulations are asked for."""

    bundle: str = ""
    """Folder or s3:// address of the trained bundle; required."""
    out: str = ""
    """Folder or s3:// address for the pictures and sheet.png; required."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of the noise; further pictures count up from there."""
    options: GenerationOptions = GenerationOptions()
    """How each stage samples, and the largest size that is wanted."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the networks run; auto takes a CUDA device where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; the sampler itself always runs in fp32."""

    with_prior: ClassVar[bool] = False
    """Whether it makes image embeddings of captions."""
    tells_image_embed: ClassVar[bool] = True
    """Whether the decoder has to be told one."""

    @property
    def drawn_with(self) -> GenerationOptions:
        """`options` with what it changes of them itself; `ConfigError` where they contradict that."""
        return self.options

    @property
    def captions(self) -> Mapping[str, Sequence[str]]:
        """What the networks read, by the field that it comes from."""
        return {}

    def check(self, bundle: Bundle) -> None:
        """Raises `ConfigError` where the bundle lacks what this needs beside its stages."""
        if self.tells_image_embed:
            check_told_image_embed(bundle)

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the further files that decide what the pictures are, by field."""
        return {}

    @abstractmethod
    def read(self, size: int) -> Originals:
        """What it begins with, of `size` pixels; `ConfigError` naming what is wrong with a picture."""

    @abstractmethod
    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        """What becomes of them."""


class _OfLatents(ManipulationConfig):
    pictures: tuple[str, ...] = ()
    """Paths or s3:// addresses of pictures; their middle squares are taken. At least one is required."""

    least: ClassVar[int] = 1

    @property
    def drawn_with(self) -> GenerationOptions:
        return deterministic(self.options)

    def read(self, size: int) -> Originals:
        if len(self.pictures) < self.least:
            raise ConfigError(f"pictures: {len(self.pictures)} given; at least {self.least} needed")
        return read_originals("pictures", self.pictures, size)


class VariationsConfig(_OfLatents):
    """Variations of pictures (unCLIP §3.1): a row for each."""

    count: int = Field(6, ge=1, le=64)
    """Variations of each picture."""
    eta: float = Field(1.0, ge=0, le=1)
    """How much is drawn anew: 0 gives back the picture, 1 keeps of it what its image embedding holds."""

    @property
    def drawn_with(self) -> GenerationOptions:
        return deterministic(self.options, eta=self.eta)

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        seeds = range(self.seed, self.seed + self.count)
        options = self.options.merged({"decoder": {"eta": None}})  # which may say what the field eta says
        latents = invert(pipeline, given.pictures, options=options)
        back = redrawn(pipeline, latents, [self.seed], eta=0.0, options=options, progress=progress)
        output = redrawn(pipeline, latents, seeds, eta=self.eta, options=options, progress=progress)
        columns = ["picture", "eta 0", *(f"eta {self.eta:g}, seed {seed}" for seed in seeds)]
        rows = zip(cells_of(back), grouped(cells_of(output), self.count), strict=True)
        return beside(given, columns, [[first, *more] for first, more in rows])


class InterpolateConfig(_OfLatents):
    """The way through two or more pictures (unCLIP §3.2): a row from each to the next."""

    frames: int = Field(7, ge=2, le=64)
    """Pictures from each to the next, with both."""
    noise: tuple[NoiseName, ...] = Field(("interpolated", "shared"), min_length=1)
    """Noise on the way between the pictures' own, so that they are met, or shared by all; a row each."""

    least: ClassVar[int] = 2

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        rows: list[tuple[str, list[Cell]]] = []
        for noise in self.noise:
            output = interpolation(
                pipeline,
                given.pictures,
                frames=self.frames,
                noise=noise,
                seed=self.seed,
                options=self.options,
                progress=progress,
            )
            cells = cells_of(output)
            for index in range(len(given.pictures) - 1):
                first = index * (self.frames - 1)
                way = cells[first : first + self.frames]
                ends = [from_outside(picture) for picture in given.pictures[index : index + 2]]
                caption = f"{given.names[index]} to {given.names[index + 1]}, {noise} noise"
                rows.append((caption, [ends[0], *way, ends[1]]))
        shares = [f"{place / (self.frames - 1):.2f} of the way" for place in range(self.frames)]
        return Sheet(["from", *shares, "to"], rows)


class TextDiffConfig(_OfLatents):
    """Pictures changed from one caption towards another (unCLIP §3.3): a row for each."""

    target: str = ""
    """What the pictures are to become; required."""
    source: str | None = DUMMY_CAPTION
    """Caption of the pictures as they are, or a dummy; null for the target's own embedding as direction."""
    max_theta: float = Field(MAX_THETA, gt=0, le=1)
    """Share of the angle to the direction at the last picture; the paper ends between 0.25 and 0.5."""
    frames: int = Field(6, ge=2, le=64)
    """Pictures on the way."""

    @property
    def captions(self) -> Mapping[str, Sequence[str]]:
        return {"target": [self.target]} | ({} if self.source is None else {"source": [self.source]})

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        path = thetas(self.frames, self.max_theta)
        output = text_diff(
            pipeline,
            given.pictures,
            self.target,
            source=self.source,
            path=path,
            seed=self.seed,
            options=self.options,
            progress=progress,
        )
        columns = ["picture", *(f"theta {theta:.2f}" for theta in path)]
        caption = f"to {self.target}" if self.source is None else f"{self.source} -> {self.target}"
        return beside(given, columns, grouped(cells_of(output), self.frames), caption)


class EditConfig(ManipulationConfig):
    """A part of a picture drawn anew, or a picture continued beyond its border, once for each seed."""

    picture: str = ""
    """Path or s3:// address; required. Its middle square is taken unless there is a canvas."""
    prompt: str = ""
    """What the whole picture shall show; required."""
    repaint: str | None = None
    """Mask of the picture's shape: white is drawn anew."""
    keep: str | None = None
    """Mask of the picture's shape: white stays. Give one of the two, or canvas."""
    canvas: float | None = Field(None, gt=0, lt=1)
    """The picture's longer side as a share of a square canvas that is drawn around it, in place of a mask."""
    place: Place = "centre"
    """Where on the canvas the picture lies."""
    feather: float = Field(FEATHER, ge=0, le=0.25)
    """Reach of the soft seam as a share of the side; 0 for a hard one. What is kept stays bit by bit."""
    count: int = Field(4, ge=1, le=64)
    """Pictures to choose from."""

    with_prior: ClassVar[bool] = True
    tells_image_embed: ClassVar[bool] = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.canvas is not None and (self.repaint is not None or self.keep is not None):
            raise ValueError(f"canvas = {self.canvas}: takes the place of a mask; set repaint and keep to null")
        return self

    @property
    def captions(self) -> Mapping[str, Sequence[str]]:
        return {"prompt": [self.prompt]}

    def read(self, size: int) -> Originals:
        """The picture, and its mask as a second one: 255 where it stays."""
        if not self.picture:
            raise ConfigError("picture: required, but not given")
        picture = read_picture("picture", self.picture)
        if self.canvas is not None:
            canvas, keep = on_canvas(picture, size, share=self.canvas, place=self.place)
        else:
            keep = read_keep(self.repaint, self.keep, picture=picture, size=size)
            canvas = resize_square(picture, size)
        mask = np.repeat(keep[..., None], 3, axis=2).astype(np.uint8) * 255
        return Originals(np.stack([canvas, mask]), ["picture", "keep"])

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        picture, keep = given.pictures[0], given.pictures[1, ..., 0] > 0
        seeds = range(self.seed, self.seed + self.count)
        output = inpainting(
            pipeline,
            picture,
            keep,
            self.prompt,
            seeds,
            feather=self.feather,
            options=self.options,
            progress=progress,
        )
        masked: Picture = np.where(keep[..., None], picture, np.uint8(127))
        shown = {"picture": picture, "kept": masked} if self.canvas is None else {"kept": masked}
        columns = [*shown, *(f"seed {seed}" for seed in seeds)]
        return Sheet(columns, [(self.prompt, [*map(from_outside, shown.values()), *cells_of(output)])])


class ProbeConfig(_OfLatents):
    """Pictures drawn from growing numbers of their embeddings' principal components (unCLIP §4): a row for each."""

    components: str | None = None
    """pca.safetensors that jobs/embed.py writes; null for the components of the bundle's autoregressive prior."""
    counts: tuple[int, ...] = ()
    """Numbers of components; none for the paper's shares of all, and all."""

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_counts(bundle, self.components, self.counts)

    @property
    def inputs(self) -> dict[str, str]:
        return {} if self.components is None else {"components": sha256_file(self.components)}

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        found = load_components(Bundle.load(self.bundle), self.components)
        return self.sheet_of(found, pipeline, given, progress)

    def sheet_of(
        self, found: Components, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None
    ) -> Sheet:
        """`sheet` with components from anywhere."""
        counts = found.counts(self.counts)
        output = probing(
            pipeline,
            pipeline.encode_image(given.pictures),
            mean=found.mean,
            components=found.components,
            counts=counts,
            seed=self.seed,
            options=self.options,
            progress=progress,
        )
        columns = ["picture", *(f"{count} of {len(found.components)}" for count in counts)]
        return beside(given, columns, grouped(cells_of(output), len(counts)), found.origin)


class AblatePriorConfig(ManipulationConfig):
    """Captions drawn without image embedding, with the text's in its place, and with the prior's (unCLIP §5.1)."""

    prompts: tuple[str, ...] = ()
    """Captions; at least one is required."""

    with_prior: ClassVar[bool] = True

    @property
    def captions(self) -> Mapping[str, Sequence[str]]:
        return {"prompts": self.prompts}

    def read(self, size: int) -> Originals:
        if not self.prompts:
            raise ConfigError("prompts: required, but not given")
        return Originals(np.zeros((0, size, size, 3), dtype=np.uint8), [])

    def sheet(self, pipeline: Pipeline, given: Originals, progress: StageProgress | None = None) -> Sheet:
        seeds = [self.seed] * len(self.prompts)
        found = prior_ablation(pipeline, self.prompts, seeds, options=self.options, progress=progress)
        columns = [cells_of(output) for output in found.values()]
        return Sheet(list(found), list(zip(self.prompts, zip(*columns, strict=True), strict=True)))


def grouped(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """`cells` in rows of `size`."""
    return [list(cells[start : start + size]) for start in range(0, len(cells), size)]


def beside(given: Originals, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Sheet:
    """Rows behind the pictures that they are made of, with their names and what `caption` says of all."""
    captions = [": ".join(filter(None, (name, caption))) for name in given.names]
    firsts = [from_outside(picture) for picture in given.pictures]
    made = [[first, *cells] for first, cells in zip(firsts, rows, strict=True)]
    return Sheet(columns, list(zip(captions, made, strict=True)))


def check_told_image_embed(bundle: Bundle) -> None:
    """Raises `ConfigError` where the bundle's decoder is told no image embedding, so that it has no z_i to change."""
    decoder = bundle.configs.get("decoder")
    if isinstance(decoder, DecoderStageConfig) and decoder.model.embed_dim is None:
        raise ConfigError(f"the decoder is told {', '.join(decoder.model.inputs)}: no image embedding")
