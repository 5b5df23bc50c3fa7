"""What a prior makes of held-out captions, and whose pictures lie nearest to it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from unclip.data.batches import BatchSpec
from unclip.evaluation.caption_scores import clip_scores, score_with_other_captions
from unclip.pipelines.stages import AnyPriorStageConfig
from unclip.training.config import TrainConfig
from unclip.training.validation.records import HeldOut
from unclip.training.validation.result import SampleGrid, Validation
from unclip.utils.random import SampleGenerator

SAMPLED_CAPTIONS = 64
"""Captions that embeddings are drawn for: enough for two digits of a mean cosine."""
NEAREST = 3
"""Held-out pictures that the grid shows of each sampled embedding."""
_GRID_PIXELS = 128


def score_prior(config: TrainConfig, stage: AnyPriorStageConfig, model: nn.Module, records: HeldOut) -> Validation:
    """Mean cosines of sampled z_i: to the true one, to z_t, and to z_t of other captions, which is the baseline.

    `cosine_text_real` is that of true z_i and z_t: what samples can hope for. The grid shows captions with the held-out
    pictures whose embeddings are nearest to the sampled ones; there is none where the records have no pictures.
    """
    batch = records.first(SAMPLED_CAPTIONS)
    real, text = (functional.normalize(batch[name].float(), dim=1) for name in ("image_embed", "text_embed"))
    streams = SampleGenerator.for_samples(config.validation.seed, batch["position"]).child("sample")
    sampler = stage.stage(model)
    sampled = sampler.sample(text, batch["tokens"].long(), streams, sampling=stage.sampling)  # type: ignore[arg-type]
    drawn, z_i, z_t = (embeds.cpu().numpy() for embeds in (sampled, real, text))
    pairs = {"cosine_image": (drawn, z_i), "cosine_text": (drawn, z_t), "cosine_text_real": (z_i, z_t)}
    metrics = {name: float(clip_scores(*pair).mean()) for name, pair in pairs.items()}
    unrelated = score_with_other_captions(drawn, z_t, records.text("caption", len(drawn)))
    if unrelated is not None:  # None: all have the same caption
        metrics["cosine_text_unrelated"] = unrelated
    has_pictures = {"image", "caption"} <= set(records.manifest.columns)
    return Validation(metrics, _grid(config, sampled, records) if has_pictures else None)


def _grid(config: TrainConfig, sampled: torch.Tensor, records: HeldOut) -> SampleGrid:
    """A row a caption: its own picture, then those of the nearest z_i."""
    batches = records.batches(config.microbatch_size)
    gallery = torch.cat([functional.normalize(batch["image_embed"].float(), dim=1) for batch in batches])
    nearest = min(NEAREST, records.count)
    count = min(config.validation.rows, len(sampled))
    found = (sampled[:count] @ gallery.T).topk(nearest, dim=1).indices.tolist()
    spec = BatchSpec(image_size=_GRID_PIXELS)
    rows = []
    for index, caption in enumerate(records.text("caption", count)):
        pictures = records.pictures([index, *found[index]], spec)["image"].cpu().numpy()
        rows.append((caption, tuple(pictures)))
    titles = ("its own picture", *(f"nearest {place + 1}" for place in range(nearest)))
    return SampleGrid(titles, tuple(rows))
