"""How rows begin in each kind of stage, and what takes them on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

import torch

from unclip.diffusion.guidance import Denoise
from unclip.diffusion.samplers import SamplingConfig
from unclip.generation.engine.batch import Batch, Entry
from unclip.generation.engine.captions import Caption, Told
from unclip.generation.engine.job import Row
from unclip.generation.engine.padding import as_it_is, compiled, padded_sizes, padding_to
from unclip.generation.engine.route import AnyStage, Stages
from unclip.generation.engine.steering import Steering
from unclip.models.prior import PriorCondition
from unclip.pipelines.guides import DecoderGuide, GuideName
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages import ARPriorStage, DecoderStage, PriorStage, UpsamplerStage
from unclip.pipelines.stages.ar_prior import ARSamplingConfig
from unclip.pipelines.stages.decoder import ConditionPart
from unclip.pipelines.stages.diffusion_stage import DiffusionStage, Start
from unclip.utils.random import SampleGenerator

EntryT = TypeVar("EntryT")


class Pool(ABC, Generic[EntryT]):
    """The rows of one stage."""

    @property
    @abstractmethod
    def rows(self) -> list[Row]:
        """Those that are running."""

    @property
    def stepping(self) -> list[Row]:
        """Those of them that the next step takes on."""
        return self.rows

    @property
    def reads_captions(self) -> bool:
        """Whether `enter` looks at the caption."""
        return True

    @abstractmethod
    def enter(self, row: Row, told: Told) -> EntryT:
        """What `admit` takes of a row that is told so; raises where it cannot begin."""

    @abstractmethod
    def admit(self, entries: Sequence[EntryT]) -> None:
        """Lets rows take part from the next step on; where that raises, none of them does."""

    @abstractmethod
    def step(self) -> list[tuple[Row, torch.Tensor]]:
        """One step; returns the rows that are done, and leave, with what the stage made of them (1, ...)."""

    @abstractmethod
    def drop(self, rows: Collection[Row]) -> None:
        """Lets rows go."""

    def clean(self, row: Row) -> torch.Tensor | None:
        """(1, 3, S, S) in [-1, 1]: what the picture of a row on its way was last predicted to become; None has none."""
        return None

    @property
    def work(self) -> tuple[int, int]:
        """Rows of all forward passes so far, and those of them that were padding."""
        return 0, 0


class DiffusionPool(Pool[Entry]):
    """The running batch of a stage that denoises; `enter` is the stage's own."""

    def __init__(self, stage: DiffusionStage, batch: Batch) -> None:
        self._diffusion, self._batch = stage, batch

    @property
    def rows(self) -> list[Row]:
        return self._batch.rows

    def admit(self, entries: Sequence[Entry]) -> None:
        self._batch.admit(entries)

    def step(self) -> list[tuple[Row, torch.Tensor]]:
        return self._batch.step()

    def drop(self, rows: Collection[Row]) -> None:
        self._batch.drop(rows)

    def enter(self, row: Row, told: Told) -> Entry:
        assert isinstance(row.sampling, SamplingConfig)
        generator = row.stream
        return Entry(row, row.sampling, self.begin(row, told, generator), generator, self.steering(row, told.caption))

    @abstractmethod
    def begin(self, row: Row, told: Told, generator: SampleGenerator) -> Start:
        """Where the row begins; x_T is the first draw of `generator`."""

    def steering(self, row: Row, caption: Caption) -> Steering:
        """What steers the row beside its condition."""
        return Steering(_known(row))

    def clean(self, row: Row) -> torch.Tensor | None:
        return self._diffusion.finish(self._batch.clean(row))

    @property
    def work(self) -> tuple[int, int]:
        return self._batch.forward_rows, self._batch.padding_rows


class PriorPool(DiffusionPool):
    """The diffusion prior: one row a draw."""

    def __init__(self, stage: PriorStage, batch: Batch) -> None:
        super().__init__(stage, batch)
        self._stage = stage

    def begin(self, row: Row, told: Told, generator: SampleGenerator) -> Start:
        assert told.caption.text_embed is not None
        row.job.text_embed = told.caption.text_embed
        length = self._stage.config.model.context_length
        tokens = told.caption.tokens[length]
        return self._stage.begin(row.job.text_embed, tokens, generator, negative=_negative(told, length))

    def clean(self, row: Row) -> torch.Tensor | None:
        return None


class DecoderPool(DiffusionPool):
    """The decoder, with its guides."""

    def __init__(self, stage: DecoderStage, batch: Batch, guides: Mapping[GuideName, DecoderGuide]) -> None:
        super().__init__(stage, batch)
        self._stage, self._guides = stage, guides

    def begin(self, row: Row, told: Told, generator: SampleGenerator) -> Start:
        request, known = row.job.request, _known(row)
        further, unseen = dict[str, torch.Tensor](), set[ConditionPart]()
        if self._stage.config.model.inpainting and known is not None:
            further |= known.told
        if row.job.image_embed is None:
            unseen.add("image")
        if request.prompt is None:
            unseen |= {"text", "label"}
        else:
            further |= self._texts(told.caption) | self._label(request.prompt, generator.keys.device)
        start = self._stage.begin(
            row.job.image_embed,
            further.pop("tokens", None),
            generator,
            further=further,
            dropped=unseen,
            negative=None if told.negative is None else self._texts(told.negative),
        )
        if request.inverts is not None:
            return start.at(to_signed(torch.tensor(request.inverts)[None]))
        return start.at(None if request.x_T is None else request.x_T[None])

    def _texts(self, caption: Caption) -> dict[str, torch.Tensor]:
        """Tokens and text states, as far as the decoder is told them."""
        length, found = self._stage.config.model.context_length, dict[str, torch.Tensor]()
        if length is not None:
            found["tokens"] = caption.tokens[length]
        if caption.text_states is not None:
            found["text_states"] = caption.text_states
        return found

    def _label(self, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The class that a prompt names, for a decoder of classes."""
        if self._stage.config.model.num_classes is None:
            return {}
        return {"label": torch.tensor([self._stage.config.classes.index(prompt)], device=device)}

    def steering(self, row: Row, caption: Caption) -> Steering:
        options, targets = row.job.route.guidance, dict[GuideName, tuple[float, torch.Tensor]]()
        for name, scale in options.gradient_scales.items():
            key = name, options.class_label
            if key not in caption.targets:
                caption.targets[key] = self._guides[name].target([row.job.caption], options)
            targets[name] = scale, caption.targets[key]
        return Steering(_known(row), targets)


class UpsamplerPool(DiffusionPool):
    """An upsampler: it takes the 8 bits that the stage before handed out."""

    def __init__(self, stage: UpsamplerStage, batch: Batch) -> None:
        super().__init__(stage, batch)
        self._stage = stage

    @property
    def reads_captions(self) -> bool:
        return False

    def begin(self, row: Row, told: Told, generator: SampleGenerator) -> Start:
        assert row.job.low_res is not None
        return self._stage.begin(to_signed(row.job.low_res), generator)


@dataclass(frozen=True)
class Asked:
    """A caption for an autoregressive prior: (1, D) z_t, (1, L) tokens, the stream of its draws, and what they lead away from."""

    row: Row
    text_embed: torch.Tensor
    tokens: torch.Tensor
    generator: SampleGenerator
    negative: PriorCondition | None

    def is_like(self, other: Asked) -> bool:
        """Whether both may share a call."""
        return self.row.sampling == other.row.sampling and (self.negative is None) == (other.negative is None)


class ARPriorPool(Pool[Asked]):
    """The autoregressive prior: its codes come one after the other, so that captions can share a whole call alone.

    A step is that call, for the captions that are sampled as the one that has waited longest is.
    """

    def __init__(self, stage: ARPriorStage) -> None:
        self._stage = stage
        self._asked: list[Asked] = []

    @property
    def rows(self) -> list[Row]:
        return [asked.row for asked in self._asked]

    @property
    def stepping(self) -> list[Row]:
        return [asked.row for asked in self._together()]

    def enter(self, row: Row, told: Told) -> Asked:
        length, caption = self._stage.config.model.context_length, told.caption
        assert caption.text_embed is not None
        return Asked(row, caption.text_embed, caption.tokens[length], row.stream, _negative(told, length))

    def admit(self, entries: Sequence[Asked]) -> None:
        self._asked.extend(entries)

    def drop(self, rows: Collection[Row]) -> None:
        self._asked = [asked for asked in self._asked if asked.row not in rows]

    def step(self) -> list[tuple[Row, torch.Tensor]]:
        together = self._together()
        sampling = together[0].row.sampling
        assert isinstance(sampling, ARSamplingConfig)
        negative = [asked.negative for asked in together if asked.negative is not None]
        embeds = self._stage.sample(
            torch.cat([asked.text_embed for asked in together]),
            torch.cat([asked.tokens for asked in together]),
            SampleGenerator(torch.cat([asked.generator.keys for asked in together])),
            sampling=sampling,
            negative=reduce(PriorCondition.cat, negative) if negative else None,
        )
        self.drop([asked.row for asked in together])
        return [(asked.row, embeds[index : index + 1]) for index, asked in enumerate(together)]

    def _together(self) -> list[Asked]:
        return [asked for asked in self._asked if asked.is_like(self._asked[0])]


def build_pool(stage: AnyStage, stages: Stages, *, compile_for: int | None = None) -> Pool[Any]:
    """The pool of a stage, empty; compiled for few numbers of rows up to `compile_for` of a batch, or as it is."""
    if isinstance(stage, ARPriorStage):
        return ARPriorPool(stage)
    network: Denoise[Any] = stage.network
    padded: Callable[[int], int] = as_it_is
    if compile_for is not None:
        most = compile_for if isinstance(stage, UpsamplerStage) else 2 * compile_for  # guided rows come twice
        network, padded = compiled(stage.network), padding_to(padded_sizes(most))
    guides = stages.guides if isinstance(stage, DecoderStage) else {}
    batch = Batch(stage, network, stages.device, padded=padded, guides=guides)
    if isinstance(stage, DecoderStage):
        return DecoderPool(stage, batch, guides)
    return PriorPool(stage, batch) if isinstance(stage, PriorStage) else UpsamplerPool(stage, batch)


def _negative(told: Told, context_length: int) -> PriorCondition | None:
    """What guidance of a prior leads away from; None for no caption at all."""
    if told.negative is None:
        return None
    assert told.negative.text_embed is not None
    return PriorCondition.of_captions(told.negative.text_embed, told.negative.tokens[context_length])


def _known(row: Row) -> KnownPixels | None:
    """What the row's picture shall show, on the row's device."""
    known = row.job.request.known.get(row.job.route.sizes.get(row.stage, 0))
    return None if known is None else known.select(slice(None), row.job.stream.keys.device)
