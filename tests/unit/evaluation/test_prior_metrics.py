"""Cosines, ranks and recalls of guesses against loops over all pairs, and of a prior that knows the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.support.gaussian import as_prediction, rowwise
from torch import nn

from unclip.evaluation import discrepancy
from unclip.evaluation.prior_metrics import prior_metrics, ranks, recall_by_chance
from unclip.models.prior import PriorCondition
from unclip.pipelines.stages import PriorStage, PriorStageConfig
from unclip.utils.random import SampleGenerator

HOW = {"resamples": 200, "seed": 0}


def units(rows: int, seed: int, dim: int = 6) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, dim)) + 0.4
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_every_number_is_the_mean_over_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrepancy, "_BLOCK", 4)
    captions = [f"caption {number % 7}" for number in range(10)]
    sampled, z_i, z_t = (units(10, seed).astype(np.float64) for seed in range(3))
    found = prior_metrics(sampled, z_i, z_t, captions, **HOW)
    rows = range(10)
    others = [(i, j) for i in rows for j in rows if captions[i] != captions[j]]
    for name, guess in (("sampled", sampled), ("text_embed", z_t)):
        assert found[name]["cosine_image"] == pytest.approx(np.mean([guess[i] @ z_i[i] for i in rows]))
        assert found[name]["cosine_text"] == pytest.approx(np.mean([guess[i] @ z_t[i] for i in rows]))
        assert found[name]["cosine_image_unrelated"] == pytest.approx(np.mean([guess[i] @ z_i[j] for i, j in others]))
        assert found[name]["cosine_text_unrelated"] == pytest.approx(np.mean([guess[i] @ z_t[j] for i, j in others]))
        places = []
        for i in rows:
            best = max(guess[i] @ z_i[j] for j in rows if captions[j] == captions[i])
            places.append(1 + sum(guess[i] @ z_i[j] >= best for j in rows if captions[j] != captions[i]))
        assert found[name]["recall_1"] == pytest.approx(np.mean([place <= 1 for place in places]))
        assert found[name]["recall_5"] == pytest.approx(np.mean([place <= 5 for place in places]))
        assert found[name]["median_rank"] == np.median(places)
        assert ranks(guess, z_i, captions).tolist() == places
    means = [np.mean([z_i[j] for j in rows if j != i], axis=0) for i in rows]
    cosines = [means[i] @ z_i[i] / np.linalg.norm(means[i]) for i in rows]
    assert found["mean_embed"]["cosine_image"] == pytest.approx(np.mean(cosines))
    of_each = [np.mean([z_i[j] @ z_i[i] for k, j in others if k == i]) for i in rows]
    assert found["other_image"]["cosine_image"] == pytest.approx(np.mean(of_each))
    assert found["true"]["cosine_text"] == pytest.approx(np.mean([z_i[i] @ z_t[i] for i in rows]))
    assert (
        found["sampled"]["cosine_image_low"] < found["sampled"]["cosine_image"] < found["sampled"]["cosine_image_high"]
    )


def test_the_true_embeddings_are_the_best_guess_and_equal_ones_count_against_it() -> None:
    z_i = units(30, 0)
    captions = [str(number) for number in range(30)]
    found = prior_metrics(z_i, z_i, units(30, 1), captions, **HOW)["sampled"]
    assert found["cosine_image"] == pytest.approx(1)
    assert (found["recall_1"], found["recall_5"], found["median_rank"]) == (1, 1, 1)
    same = np.repeat(z_i[:1], 30, axis=0)
    assert (ranks(same, same, captions) == 30).all()


def test_records_of_one_caption_have_no_others_to_be_compared_with() -> None:
    found = prior_metrics(*(units(4, seed) for seed in range(3)), ["a"] * 4, **HOW)
    assert found["other_image"] == {}
    assert not [name for name in found["sampled"] if name.endswith("_unrelated")]
    assert found["sampled"]["recall_1"] == found["chance"]["recall_1"] == 1
    assert all(math.isfinite(value) for numbers in found.values() for value in numbers.values())


def test_chance_is_the_share_of_random_guesses() -> None:
    captions = [f"caption {number % 4}" for number in range(6)]  # two of them twice
    for most in (1, 5):
        hits = []
        for own in range(4):
            members = [row for row in range(6) if captions[row] == f"caption {own}"]
            missed = math.comb(6 - len(members), most) / math.comb(6, most)
            hits += [1 - missed] * len(members)
        assert recall_by_chance(captions, most) == pytest.approx(np.mean(hits))
    assert recall_by_chance([str(row) for row in range(50)], 5) == pytest.approx(0.1)
    assert recall_by_chance(["a"] * 3, 5) == 1


class ExactPrior(nn.Module):
    """The network of z_i that are z_t plus independent noise of a known variance, in the units of the process."""

    def __init__(self, config: PriorStageConfig, scale: float, variance: float) -> None:
        super().__init__()
        self.process, self.scale, self.variance = config.diffusion.build(), scale, variance
        self.weight = nn.Parameter(torch.ones(()))

    def prepare(self, cond: PriorCondition) -> PriorCondition:
        return cond

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: PriorCondition) -> torch.Tensor:
        abar = rowwise(self.process.alphas_cumprod(timesteps), x_t)
        mean = self.scale * cond.text_embed
        gain = abar.sqrt() * self.variance / (abar * self.variance + 1 - abar)
        return as_prediction(self.process, mean + gain * (x_t - abar.sqrt() * mean), x_t, timesteps)


def test_a_prior_that_knows_the_distribution_gets_the_cosines_of_another_draw_from_it() -> None:
    """z_i = z_t + e, of which both true and sampled ones are draws: their cosines are those of the closed form.

    In D dimensions with |e|^2 near its mean s: cos(z_i, z_t) is near 1 / sqrt(1 + s), cos of two draws near 1 / (1 + s).
    """
    dim, count, s = 256, 120, 0.8
    generator = np.random.default_rng(0)
    z_t = generator.normal(size=(count, dim))
    z_t /= np.linalg.norm(z_t, axis=1, keepdims=True)
    z_i = z_t + generator.normal(size=(count, dim)) * math.sqrt(s / dim)
    z_i /= np.linalg.norm(z_i, axis=1, keepdims=True)
    scale = math.sqrt(dim)  # as the normaliser's: a coordinate's deviation is near 1
    config = PriorStageConfig.from_dict(
        {
            "model": {"embed_dim": dim, "context_length": 4, "width": 16, "depth": 1, "heads": 2},
            "diffusion": {"prediction_type": "sample", "num_train_timesteps": 1000},
            "sampling": {"sampler": "ddim", "eta": 1.0, "num_inference_steps": 60},
            "normalizer": {"std": 1 / scale},
            "num_draws": 1,
        }
    )
    stage = PriorStage(config, ExactPrior(config, scale, s))
    streams = SampleGenerator.for_samples(0, torch.arange(count))
    tokens = torch.ones(count, 4, dtype=torch.int64)
    sampled = stage.sample(torch.tensor(z_t).float(), tokens, streams, sampling=config.sampling).numpy()
    captions = [str(row) for row in range(count)]
    found = prior_metrics(sampled, z_i, z_t, captions, **HOW)
    assert found["sampled"]["cosine_image"] == pytest.approx(1 / (1 + s), abs=0.02)
    assert found["sampled"]["cosine_text"] == pytest.approx(1 / math.sqrt(1 + s), abs=0.02)
    assert found["true"]["cosine_text"] == pytest.approx(1 / math.sqrt(1 + s), abs=0.02)
    assert found["text_embed"]["cosine_image"] == pytest.approx(1 / math.sqrt(1 + s), abs=0.02)
    assert abs(found["sampled"]["cosine_image_unrelated"]) < 0.02
    assert abs(found["other_image"]["cosine_image"]) < 0.02
    assert found["sampled"]["recall_1"] > 0.95
    assert found["chance"]["recall_1"] == pytest.approx(1 / count)
