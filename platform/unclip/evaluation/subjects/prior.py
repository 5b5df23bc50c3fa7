"""A prior: what it makes of held-out captions, against the embeddings of their pictures (unCLIP, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.manifest import DataError
from unclip.evaluation.bundle_stage import BundleStage, check_embeddings, streams_of
from unclip.evaluation.config import EvaluatePriorConfig
from unclip.evaluation.extractors import Network
from unclip.evaluation.feature_folder import FeatureFolder, Features
from unclip.evaluation.pictures import ParquetPictures, PictureSet, Unit, choose, open_records
from unclip.evaluation.prior_metrics import prior_metrics, ranks
from unclip.evaluation.prior_report import prior_page
from unclip.evaluation.subject import Judgement, check_given, settings_of
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.options import AnySampling
from unclip.pipelines.stages import AnyPriorStage, AnyPriorStageConfig
from unclip.utils import storage

RECORDS = "records"
SAMPLED, IMAGE, TEXT = "sampled", "image_embed", "text_embed"
_SETTINGS = ("limit", "seed", "resamples")
_RECORDS_FILE = "captions.parquet"


class PriorSampler:
    """Embeddings of unit norm, (B, D) float32: those that the prior draws, the true ones of the pictures, the captions'.

    Args:
        sampling: how it samples.
        seed: with a record's id, its noise.
    """

    columns: tuple[str, ...] = (SAMPLED, IMAGE, TEXT)

    def __init__(self, stage: BundleStage, sampling: AnySampling, seed: int) -> None:
        self._bundle, self._sampling, self._seed = stage, sampling, seed
        self._stage: AnyPriorStage | None = None

    def setup(self, device: str) -> None:
        config, model = self._bundle.load(device)
        assert isinstance(config, AnyPriorStageConfig)
        self._stage, self._device = config.stage(model), device

    @torch.no_grad()
    def extract(self, inputs: Batch) -> Batch:
        assert self._stage is not None, "setup() comes before extract()"
        image, text = (functional.normalize(torch.tensor(inputs[name]).float(), dim=1) for name in (IMAGE, TEXT))
        sampled = self._stage.sample(
            text.to(self._device),
            torch.tensor(inputs["tokens"]).long().to(self._device),
            streams_of(self._seed, torch.tensor(inputs["id"]), self._device),
            sampling=self._sampling,  # type: ignore[arg-type]  # it is of this stage's kind
        )
        return {SAMPLED: functional.normalize(sampled, dim=1).cpu().numpy(), IMAGE: image.numpy(), TEXT: text.numpy()}


class PriorSubject:
    """A bundle's prior; `ConfigError`, `BundleError` or `DataError` where it cannot be judged.

    Args:
        config: with an absolute `out`.
    """

    roles: tuple[str, ...] = (RECORDS,)

    def __init__(self, config: EvaluatePriorConfig) -> None:
        check_given(config, ["bundle", RECORDS])
        self.config = config
        bundle = Bundle.load(config.bundle)
        stage, prior = BundleStage.of(bundle, "prior"), bundle.configs["prior"]
        assert isinstance(prior, AnyPriorStageConfig)
        sampling = config.options.apply("options", prior)
        self._spec = BatchSpec(tokenizer="simple", context_length=prior.model.context_length, embeddings=(IMAGE, TEXT))
        records = open_records(RECORDS, config.records, (IMAGE, TEXT), captions=True)
        check_embeddings(bundle, records.uri, (records.facts.get("clip") or {}).get("fingerprint"))
        chosen = choose(RECORDS, records, limit=config.limit, seed=config.seed)
        if chosen.rows < 2:
            raise ConfigError(f"records: {chosen.rows} are too few; another one is needed to compare with")
        self.sets = {RECORDS: chosen}
        self.folders = {RECORDS: FeatureFolder(storage.join(config.out, "features", RECORDS))}
        self._sampler = PriorSampler(stage, sampling, config.seed)
        self.protocol: dict[str, Any] = {
            "kind": "prior",
            RECORDS: chosen.protocol(),
            "bundle": stage.protocol,
            "sampling": {"prior": sampling.to_dict(), "num_draws": prior.num_draws},
            "settings": settings_of(config, _SETTINGS),
        }

    def networks(self, name: str) -> Sequence[Network]:
        return (self._sampler,)

    def inputs(self, name: str, unit: Unit, table: pa.Table) -> Batch:
        try:
            return make_batch(table, np.arange(table.num_rows), self._spec, seed=0)
        except DataError as error:
            raise DataError(f"{self.sets[name].pictures.uri!r}: {error}") from None

    def folder_protocol(self, name: str) -> dict[str, Any]:
        return self.protocol

    def judge(self, gathered: Mapping[str, Features]) -> Judgement:
        features = gathered[RECORDS]
        captions = [caption or "" for caption in features.captions]
        sampled, image, text = (features.columns[name] for name in (SAMPLED, IMAGE, TEXT))
        found = prior_metrics(sampled, image, text, captions, resamples=self.config.resamples, seed=self.config.seed)
        table = pa.table(
            {
                "id": features.ids,
                "caption": captions,
                "cosine_image": (sampled.astype(np.float64) * image).sum(axis=1),
                "cosine_text": (sampled.astype(np.float64) * text).sum(axis=1),
                "rank": ranks(sampled, image, captions),
            }
        )
        page = prior_page(self.protocol, found, features, table, self._pictures(), show=self.config.show)
        return Judgement(found, page, {_RECORDS_FILE: table})

    def _pictures(self) -> PictureSet | None:
        """The same records with their pictures, where they have some."""
        chosen = self.sets[RECORDS]
        assert isinstance(chosen.pictures, ParquetPictures)
        if "image" not in chosen.pictures.manifest.columns:
            return None
        return replace(chosen, pictures=replace(chosen.pictures, columns=("image",)))
