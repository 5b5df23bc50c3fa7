"""Captions as the stages are told them: encoded once, for prior and decoder, for every draw and every further picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from unclip.generation.engine.job import Job
from unclip.generation.engine.request import EncodedCaption
from unclip.generation.engine.route import Stages
from unclip.models.clip import Tokenizer
from unclip.pipelines.guides import GuideName
from unclip.pipelines.stages import ARPriorStage, DecoderStage, PriorStage

_KEPT = 256
"""Captions whose encodings are kept: those of a text encoder's states are about 200 kB each."""

Text = tuple[str, EncodedCaption | None]
"""A caption, and its encoding where it comes with one."""


@dataclass(frozen=True)
class Caption:
    """tokens: (1, L) int64 for each context length L of a stage. text_embed: (1, D) z_t, unit norm, and text_states
    (1, L, S), where a stage is told them. targets: what guides steer towards, by guide and class, filled in when a
    request is first guided so.
    """

    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)
    text_embed: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
    targets: dict[tuple[GuideName, str | None], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """Of a request: its caption, and the one that guidance leads away from, None for no caption at all."""

    caption: Caption = field(default_factory=Caption)
    negative: Caption | None = None


class Captions:
    """Encodes captions, and keeps the last of them that were asked for."""

    def __init__(self, stages: Stages) -> None:
        self._clip, self._device = stages.clip, stages.device
        self._lengths: set[int] = set()
        self._with_states = False
        for stage in stages.by_name.values():
            if isinstance(stage, PriorStage | ARPriorStage):
                self._lengths.add(stage.config.model.context_length)
            elif isinstance(stage, DecoderStage):
                self._lengths |= {length for length in (stage.config.model.context_length,) if length is not None}
                self._with_states = stage.config.model.text_states is not None
        self._kept: OrderedDict[tuple[str, bool], Caption] = OrderedDict()  # by text, and whether the CLIP encodes it

    def told(self, jobs: Sequence[Job]) -> list[Told]:
        """What each of `jobs` is told."""
        texts: list[Text] = [(job.caption, job.request.encoded) for job in jobs]
        negative = [(job.request.negative_prompt, job.request.negative_encoded) for job in jobs]
        texts += [(text, encoded) for text, encoded in negative if text is not None]
        captions = iter(self.encode(texts))
        positive = [next(captions) for _ in jobs]
        return [
            Told(caption, None if text is None else next(captions))
            for caption, (text, _) in zip(positive, negative, strict=True)
        ]

    def encode(self, texts: Iterable[Text]) -> list[Caption]:
        """Of each of `texts`; those that are new and come without an encoding go through the text encoder together."""
        wanted = [((text, encoded is None), encoded) for text, encoded in texts]
        keys = dict.fromkeys(key for key, _ in wanted)
        for by_clip in (True, False):
            new = [key for key in keys if key not in self._kept and key[1] == by_clip]
            if new:
                captions = self._captions([text for text, _ in new], by_clip=by_clip)
                self._kept |= zip(new, captions, strict=True)
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._with(self._kept[key], encoded) for key, encoded in wanted]
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _with(self, caption: Caption, encoded: EncodedCaption | None) -> Caption:
        """`caption` with an encoding from elsewhere; what guides steer towards stays shared."""
        if encoded is None:
            return caption
        states = encoded.text_states if self._with_states else None
        return replace(
            caption,
            text_embed=encoded.text_embed[None].to(self._device, torch.float32),
            text_states=None if states is None else states[None].to(self._device, torch.float32),
        )

    def _captions(self, texts: list[str], *, by_clip: bool) -> list[Caption]:
        """Their tokens, and what the CLIP makes of them, where it shall and there is one."""
        embeds = states = None
        if by_clip and self._clip is not None:
            tokens = self._clip.tokenize(texts)
            if self._with_states:
                embeds, states = self._clip.encode_text_states(tokens)
            else:
                embeds = self._clip.encode_text(tokens)
        by_length = {
            length: torch.from_numpy(Tokenizer(None)(texts, length)).to(self._device, torch.int64)
            for length in self._lengths
        }
        return [
            Caption(
                {length: tokens[row : row + 1] for length, tokens in by_length.items()},
                None if embeds is None else embeds[row : row + 1],
                None if states is None else states[row : row + 1],
            )
            for row in range(len(texts))
        ]
