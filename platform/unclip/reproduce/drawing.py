"""What the networks of one seed draw: embeddings and pictures of the held-out captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.options import DecoderOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import (
    AnyPriorStage,
    AnyPriorStageConfig,
    DecoderStage,
    DecoderStageConfig,
    StageConfig,
    StageName,
)
from unclip.reproduce.variants import EMBEDDINGS, Embeddings, Pictures
from unclip.utils import storage

_SEEDS_APART = 1_000_000


class Artist:
    """Draws with the networks of one seed; the same noise for every variant, so that they differ in nothing else.

    Args:
        networks: folder with a bundle for each network.
        clip: whose z_t the captions have, on `device`.
        captions: N of them; pictures of one caption have it several times.
        seed: of the networks; the noise is that of N seeds of its own.
    """

    def __init__(
        self, networks: str, *, clip: ClipModel, captions: Sequence[str], seed: int, device: torch.device
    ) -> None:
        self._networks, self._clip, self._device = networks, clip, device
        self._captions = list(captions)
        self._seeds = [seed * _SEEDS_APART + row for row in range(len(captions))]
        self._load = cache(self._loaded)  # for as long as this seed is drawn with

    def embeddings(self, wanted: Embeddings) -> torch.Tensor:
        """z_i (N, D), unit norm, on the CPU."""
        prior = self._prior(wanted)
        return self._pipeline("decoder", prior).draw(self._seeds).prior(self._captions).cpu()

    def pictures(self, wanted: Pictures, image_embed: torch.Tensor | None) -> npt.NDArray[np.uint8]:
        """uint8 (N, S, S, 3); `image_embed` are those that it is told in the place of z_i, where these are an embedding's."""
        pipeline = self._pipeline(wanted.decoder)
        options = GenerationOptions(decoder=DecoderOptions(guidance_scale=wanted.guidance_scale))
        if wanted.told == "z_t":
            image_embed = pipeline.encode_text(self._captions)
        drawn = pipeline.draw(self._seeds, options=options).decode(prompts=self._captions, image_embed=image_embed)
        return drawn.cpu().numpy()

    def _pipeline(self, decoder: str, prior: AnyPriorStage | None = None) -> Pipeline:
        config, model = self._load(decoder, "decoder")
        assert isinstance(config, DecoderStageConfig)
        return Pipeline(DecoderStage(config, model), clip=self._clip, prior=prior, device=self._device)

    def _prior(self, wanted: Embeddings) -> AnyPriorStage:
        config, model = self._load(wanted.prior, "prior")
        assert isinstance(config, AnyPriorStageConfig)
        return config.model_copy(update={"num_draws": wanted.draws}).stage(model)

    def _loaded(self, network: str, stage: StageName) -> tuple[StageConfig, nn.Module]:
        bundle = Bundle.load(storage.join(self._networks, network))
        return bundle.configs[stage], bundle.load_model(stage).to(self._device)


def told_embeddings(wanted: Pictures) -> str | None:
    """The name of the embeddings that pictures are drawn from; None where they need none of a prior's."""
    return wanted.told if wanted.told in EMBEDDINGS else None
