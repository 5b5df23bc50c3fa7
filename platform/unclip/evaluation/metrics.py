"""All metrics of a set of pictures, from its gathered features and those of its reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unclip.evaluation.caption_scores import Scores, clip_scores, mean_and_interval, score_with_other_captions
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.discrepancy import cmmd, kernel_distance
from unclip.evaluation.extractors import CLIP, CLIP_TEXT, INCEPTION, INCEPTION_LOGITS
from unclip.evaluation.feature_folder import Features
from unclip.evaluation.frechet import frechet_distance, statistics_of
from unclip.evaluation.inception_score import inception_score
from unclip.evaluation.manifolds import diversity, precision_and_recall
from unclip.evaluation.subject import Metrics


@dataclass(frozen=True)
class CaptionScores:
    """CLIP-scores of those pictures that have a caption.

    Args:
        rows: (M,) their numbers in the set.
        scores: (M,).
        summary: `pictures`, `mean`, `low` and `high` (95% interval), `other_captions`: the baseline, perhaps None.
    """

    rows: npt.NDArray[np.int64]
    scores: Scores
    summary: Metrics


def compare(pictures: Features, reference: Features | None, config: EvaluatePicturesConfig) -> Metrics:
    """By the name of the features, as JSON values; without a reference only what needs none."""
    metrics: Metrics = {}
    for name in (CLIP, INCEPTION):
        if name in pictures.columns:
            own = pictures.columns[name]
            metrics[name] = {"diversity": diversity(own)}
            if reference is not None:
                metrics[name] |= _against(name, own, reference.columns[name], config)
    if INCEPTION_LOGITS in pictures.columns:
        metrics[INCEPTION] |= _inception_scores("", pictures, config)
        if reference is not None:
            metrics[INCEPTION] |= _inception_scores("reference_", reference, config)
    return metrics


def _inception_scores(prefix: str, features: Features, config: EvaluatePicturesConfig) -> Metrics:
    mean, deviation = inception_score(
        features.columns[INCEPTION_LOGITS], splits=config.inception_splits, seed=config.seed
    )
    return {f"{prefix}inception_score": mean, f"{prefix}inception_score_std": deviation}


def _against(
    name: str, own: npt.NDArray[np.float32], real: npt.NDArray[np.float32], config: EvaluatePicturesConfig
) -> Metrics:
    mean, deviation = kernel_distance(
        own, real, subsets=config.kid_subsets, subset_size=config.kid_subset_size, seed=config.seed
    )
    precision, recall = precision_and_recall(own, real, config.neighbours)
    return {
        "reference_diversity": diversity(real),
        "frechet_distance": frechet_distance(statistics_of(own), statistics_of(real)),
        **({"cmmd": cmmd(own, real)} if name == CLIP else {}),  # defined for unit norm
        "kernel_distance": mean,
        "kernel_distance_std": deviation,
        "precision": precision,
        "recall": recall,
    }


def score_captions(features: Features, config: EvaluatePicturesConfig) -> CaptionScores | None:
    """None where no picture has a caption."""
    rows = np.array([row for row, caption in enumerate(features.captions) if caption is not None], dtype=np.int64)
    if not len(rows):
        return None
    captions = [caption for caption in features.captions if caption is not None]
    images, texts = features.columns[CLIP][rows], features.columns[CLIP_TEXT][rows]
    scores = clip_scores(images, texts)
    summary = {
        "pictures": len(rows),
        **mean_and_interval(scores, captions, resamples=config.resamples, seed=config.seed),
        "other_captions": score_with_other_captions(images, texts, captions),
    }
    return CaptionScores(rows, scores, summary)
