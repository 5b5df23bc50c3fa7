"""What may not be asked for or handed out: hooks before and after a picture is drawn, and the two that are built in.

What a hook raises fails the request: nothing passes because a check is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from unclip.config.base import ConfigError
from unclip.data.decode import Picture
from unclip.serving.config import ConceptConfig, PolicyConfig
from unclip.serving.errors import ContentRefused
from unclip.serving.guards.audit import Audit, Where
from unclip.serving.guards.blocklist import Blocklist
from unclip.serving.observe.meters import Meters, NoMeters
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.model import Model


@dataclass(frozen=True)
class Finding:
    """Why something is refused.

    Args:
        rule: which of the hook's, for the audit log; nothing that tells the prompt's text.
        reason: for the client, as the end of "is refused: ..."; what kind of rule it is, not what it says.
        index: of the text or picture.
        score: how sure the hook is, where it has a measure.
    """

    rule: str
    reason: str
    index: int
    score: float | None = None


class PromptHook(Protocol):
    """Looks at prompts before anything is drawn."""

    name: str

    async def check_prompts(self, texts: Sequence[str]) -> Finding | None:
        """The first thing to refuse in prompts, negative ones among them; None where there is nothing."""
        ...


class PictureHook(Protocol):
    """Looks at pictures that clients give, and at those that are made, previews among them."""

    name: str

    async def check_pictures(self, pictures: Sequence[Picture]) -> Finding | None:
        """The first thing to refuse in pictures uint8 (H, W, 3); None where there is nothing."""
        ...


class Policy:
    """All hooks of a server, in their order; the first that finds something refuses.

    Args:
        prompt_hooks: look at prompts before.
        picture_hooks: look at pictures before they are handed out.
        audit: where refusals are written.
        meters: where they are counted.
    """

    def __init__(
        self,
        prompt_hooks: Sequence[PromptHook],
        picture_hooks: Sequence[PictureHook],
        *,
        audit: Audit,
        meters: Meters | None = None,
    ) -> None:
        self._meters = NoMeters() if meters is None else meters
        self._prompt_hooks, self._picture_hooks, self._audit = tuple(prompt_hooks), tuple(picture_hooks), audit

    @classmethod
    def build(cls, config: PolicyConfig, chain: Chain, meters: Meters | None = None) -> Policy:
        """The hooks that are configured; raises `ConfigError` for a list that cannot be read, or concepts without a CLIP."""
        prompt_hooks: list[PromptHook] = []
        picture_hooks: list[PictureHook] = []
        if config.blocklist is not None:
            prompt_hooks.append(BlockedPhrases(Blocklist.load(config.blocklist)))
        if config.concepts:
            concepts = Concepts(config.concepts, chain)
            prompt_hooks += [concepts] if concepts.checks_prompts else []
            picture_hooks += [concepts] if concepts.checks_pictures else []
        return cls(prompt_hooks, picture_hooks, audit=Audit(prompts=config.audit_prompts), meters=meters)

    @property
    def checks_pictures(self) -> bool:
        """Whether `check_pictures` does anything."""
        return bool(self._picture_hooks)

    async def check_prompts(self, texts: Sequence[str]) -> None:
        """Raises `ContentRefused` where a hook finds something in one of the texts, and writes it into the audit log."""
        for hook in self._prompt_hooks if texts else ():
            found = await hook.check_prompts(texts)
            if found is not None:
                self._refuse(hook.name, found, "prompt", texts[found.index])

    async def check_pictures(self, pictures: Sequence[Picture], *, given: bool = False) -> None:
        """The same for pictures uint8 (H, W, 3): those that came with the request (`given`), or that were made."""
        for hook in self._picture_hooks if pictures else ():
            found = await hook.check_pictures(pictures)
            if found is not None:
                self._refuse(hook.name, found, "given picture" if given else "picture", None)

    def _refuse(self, hook: str, found: Finding, where: Where, prompt: str | None) -> None:
        self._meters.count("unclip_serve_policy_refusals", subject=where, hook=hook)
        self._audit.refused(hook=hook, rule=found.rule, where=where, score=found.score, prompt=prompt)
        subject = {
            "prompt": "the prompt",
            "given picture": "a picture of the request",
            "picture": "a picture that was made",
        }[where]
        raise ContentRefused(f"{subject} is refused by the content policy: {found.reason}")


class BlockedPhrases:
    """Words and phrases that no prompt may contain."""

    name = "blocklist"

    def __init__(self, blocklist: Blocklist) -> None:
        self._blocklist = blocklist

    async def check_prompts(self, texts: Sequence[str]) -> Finding | None:
        for index, text in enumerate(texts):
            line = self._blocklist.find(text)
            if line is not None:
                return Finding(f"line {line}", "it contains a word or phrase that is not allowed", index)
        return None


class Concepts:
    """Things that are known by their likeness in CLIP's space: the cosine of an embedding and the nearest of their captions.

    The captions are encoded once for each CLIP that comes into use.
    """

    name = "concepts"

    def __init__(self, concepts: Sequence[ConceptConfig], chain: Chain) -> None:
        if chain.models.current.bundle.clip is None:
            raise ConfigError("policy.concepts: the bundle has no CLIP to know them by")
        self._concepts, self._chain = tuple(concepts), chain
        self._kept: tuple[str, torch.Tensor] | None = None

    @property
    def checks_prompts(self) -> bool:
        """Whether any concept has a threshold for prompts."""
        return any(concept.prompt_threshold is not None for concept in self._concepts)

    @property
    def checks_pictures(self) -> bool:
        """Whether any concept has one for pictures."""
        return any(concept.picture_threshold is not None for concept in self._concepts)

    async def check_prompts(self, texts: Sequence[str]) -> Finding | None:
        captions = await self._captions()
        embeds = torch.stack([encoded.text_embed.float().cpu() for encoded in await self._chain.encode_texts(texts)])
        thresholds = [concept.prompt_threshold for concept in self._concepts]
        return self._first(embeds @ captions.T, thresholds, "it is about something that is not allowed")

    async def check_pictures(self, pictures: Sequence[Picture]) -> Finding | None:
        captions = await self._captions()
        embeds = (await self._chain.encode_pictures(pictures)).float().cpu()
        thresholds = [concept.picture_threshold for concept in self._concepts]
        return self._first(embeds @ captions.T, thresholds, "it shows something that is not allowed")

    async def _captions(self) -> torch.Tensor:
        """(T, D) z_t of all concepts' texts, one after the other.

        They are kept while all weights that may be in use have the same CLIP. Where those before had another one, a group that
        does not have the new ones yet still answers with it, so they are asked for beside each prompt or picture.
        """
        models = self._chain.models
        spaces = [_space(model) for model in (models.current, models.previous) if model is not None]
        if self._kept is not None and set(spaces) == {self._kept[0]}:
            return self._kept[1]
        texts = [text for concept in self._concepts for text in concept.texts]
        embeds = torch.stack([one.text_embed.float().cpu() for one in await self._chain.encode_texts(texts)])
        self._kept = spaces[0], embeds
        return embeds

    def _first(self, cosines: torch.Tensor, thresholds: Sequence[float | None], reason: str) -> Finding | None:
        """What to refuse by `cosines` (N, T) of N texts or pictures and all captions."""
        by_concept = cosines.split([len(concept.texts) for concept in self._concepts], dim=1)
        for concept, threshold, likeness in zip(self._concepts, thresholds, by_concept, strict=True):
            if threshold is None:
                continue
            nearest = likeness.max(dim=1).values
            for index, score in enumerate(nearest.tolist()):
                if not score < threshold:  # what is no number is refused, too
                    return Finding(concept.name, reason, index, score)
        return None


def _space(model: Model) -> str:
    """Fingerprint of the CLIP that the model belongs to."""
    return "" if model.bundle.clip is None else model.bundle.clip.fingerprint
