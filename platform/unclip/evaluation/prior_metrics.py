"""How good guesses of captions' image embeddings are: those of a prior, and baselines that need none.

z_i are embeddings of pictures, z_t of captions, all (N, D) of unit norm, a row a record. Records with the same caption are
one question: a prior that hears nothing but the caption cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unclip.evaluation.caption_scores import (
    Scores,
    clip_scores,
    mean_and_interval,
    score_with_other_captions,
    sums_with_other_captions,
)
from unclip.evaluation.discrepancy import blocks

Embeddings = npt.NDArray[Any]
RECALLS = (1, 5)


def prior_metrics(
    sampled: Embeddings, z_i: Embeddings, z_t: Embeddings, captions: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """By guess, and for `chance` and `true` what there is to compare them with; as JSON values.

    Guesses of each record's z_i: `sampled` by the prior; `text_embed`, z_t itself; `mean_embed`, the mean of all other
    records' z_i; `other_image`, the z_i of another caption's record (each of them in turn: the mean over all).

    Of each guess: its cosines to the true z_i (`cosine_image`), to the own z_t (`cosine_text`), to the z_i and z_t of other
    captions (`…_unrelated`), the share of records whose own z_i is among the 1 or 5 nearest to the guess, of all
    records' (`recall_1`, `recall_5`), and the median of its rank. 95% intervals are over captions, and there for
    `cosine_image`, `cosine_text` and the recalls.
    """
    rest = z_i.astype(np.float64).sum(axis=0) - z_i
    guesses = {"sampled": sampled, "text_embed": z_t, "mean_embed": rest / np.linalg.norm(rest, axis=1, keepdims=True)}
    how = {"resamples": resamples, "seed": seed}
    found = {name: _of_guess(guess, z_i, z_t, captions, how) for name, guess in guesses.items()}
    found["other_image"] = {}
    for name, own in (("cosine_image", z_i), ("cosine_text", z_t)):
        sums, counts = sums_with_other_captions(own, z_i, captions)
        if counts.all():  # else all records have one caption
            found["other_image"] |= _mean_of(name, sums / counts, captions, how)
    found["true"] = {
        **_mean_of("cosine_text", clip_scores(z_i, z_t), captions, how),
        **_unrelated("cosine_text_unrelated", z_i, z_t, captions),
    }
    found["chance"] = {f"recall_{most}": recall_by_chance(captions, most) for most in RECALLS}
    return found


def ranks(guesses: Embeddings, z_i: Embeddings, captions: Sequence[str]) -> npt.NDArray[np.int64]:
    """(N,) places from 1 of the nearest z_i of the own caption among all N: one more than those of others that are as near."""
    x, y = guesses.astype(np.float64), z_i.astype(np.float64)
    groups = np.unique(np.array(captions), return_inverse=True)[1]
    found = np.empty(len(x), dtype=np.int64)
    for rows in blocks(x):
        cosines = x[rows] @ y.T
        is_own = groups[rows, np.newaxis] == groups
        best = np.where(is_own, cosines, -np.inf).max(axis=1, keepdims=True)
        found[rows] = 1 + ((cosines >= best) & ~is_own).sum(axis=1)
    return found


def recall_by_chance(captions: Sequence[str], most: int) -> float:
    """The mean probability that one of the own caption's records is among `most` that are drawn of all."""
    groups, counts = np.unique(np.array(captions), return_inverse=True, return_counts=True)[1:]
    total, missed = len(captions), np.ones(len(counts))
    for place in range(min(most, total)):
        missed *= np.clip(total - counts - place, 0, None) / (total - place)
    return float(1 - missed[groups].mean())


def _of_guess(
    guess: Embeddings, z_i: Embeddings, z_t: Embeddings, captions: Sequence[str], how: Mapping[str, int]
) -> dict[str, float]:
    places = ranks(guess, z_i, captions)
    found = {
        **_mean_of("cosine_image", clip_scores(guess, z_i), captions, how),
        **_unrelated("cosine_image_unrelated", guess, z_i, captions),
        **_mean_of("cosine_text", clip_scores(guess, z_t), captions, how),
        **_unrelated("cosine_text_unrelated", guess, z_t, captions),
    }
    for most in RECALLS:
        found |= _mean_of(f"recall_{most}", (places <= most).astype(np.float64), captions, how)
    return found | {"median_rank": float(np.median(places))}


def _mean_of(name: str, scores: Scores, captions: Sequence[str], how: Mapping[str, int]) -> dict[str, float]:
    summary = mean_and_interval(scores, captions, **how)
    return {name: summary["mean"], f"{name}_low": summary["low"], f"{name}_high": summary["high"]}


def _unrelated(name: str, first: Embeddings, second: Embeddings, captions: Sequence[str]) -> dict[str, float]:
    mean = score_with_other_captions(first, second, captions)
    return {} if mean is None else {name: mean}
