"""Captions as the stages are told them: encoded once, for prior and decoder, for every draw and every further picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from unclip.generation.engine.route import Stages
from unclip.models.clip import Tokenizer
from unclip.pipelines.guides import GuideName
from unclip.pipelines.stages import ARPriorStage, DecoderStage, PriorStage

_KEPT = 256
"""Captions whose encodings are kept: those of a text encoder's states are about 200 kB each."""


@dataclass(frozen=True)
class Caption:
    """tokens: (1, L) int64 for each context length L of a stage. text_embed: (1, D) z_t, unit norm, and text_states
    (1, L, S), where a CLIP makes them for a stage. targets: what guides steer towards, by guide and class, filled in when a
    request is first guided so.
    """

    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)
    text_embed: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
    targets: dict[tuple[GuideName, str | None], torch.Tensor] = field(default_factory=dict)


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
        self._kept: OrderedDict[str, Caption] = OrderedDict()

    def encode(self, prompts: Iterable[str]) -> dict[str, Caption]:
        """Of each of `prompts`; those that are new go through the text encoder together."""
        wanted = dict.fromkeys(prompts)
        new = [prompt for prompt in wanted if prompt not in self._kept]
        if new:
            self._kept |= zip(new, self._encoded(new), strict=True)
        found = {}
        for prompt in wanted:
            found[prompt] = self._kept[prompt]
            self._kept.move_to_end(prompt)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _encoded(self, prompts: list[str]) -> list[Caption]:
        embeds = states = None
        if self._clip is not None:
            tokens = self._clip.tokenize(prompts)
            if self._with_states:
                embeds, states = self._clip.encode_text_states(tokens)
            else:
                embeds = self._clip.encode_text(tokens)
        by_length = {
            length: torch.from_numpy(Tokenizer(None)(prompts, length)).to(self._device, torch.int64)
            for length in self._lengths
        }
        return [
            Caption(
                {length: tokens[row : row + 1] for length, tokens in by_length.items()},
                None if embeds is None else embeds[row : row + 1],
                None if states is None else states[row : row + 1],
            )
            for row in range(len(prompts))
        ]
