"""A whole reproduction of the smallest networks: every file, every number from its files, and what is missing made again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import sqrtm

from unclip.config.base import ConfigError
from unclip.data.manifest import read_slices, scan
from unclip.pipelines.bundle import Bundle
from unclip.reproduce.config import ReproduceConfig, debug
from unclip.reproduce.job import Reproduction
from unclip.reproduce.variants import EMBEDDINGS, NETWORKS, PICTURES
from unclip.training.objectives.decoder import DecoderObjectiveConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ReproduceConfig:
    return debug().merged({"out": str(tmp_path_factory.mktemp("reproduce") / "out")})


@pytest.fixture(scope="module")
def out(config: ReproduceConfig) -> Path:
    Reproduction(config).run()
    return Path(config.out)


def test_every_network_is_trained_with_its_changes(out: Path) -> None:
    for seed in range(2):
        for name, network in NETWORKS.items():
            stored = json.loads((out / "runs" / f"seed-{seed}" / name / "config.json").read_text())
            assert stored["seed"] == seed
            kind = "decoder" if network.base == "decoder" else "prior"
            assert kind in Bundle.load(str(out / f"seed-{seed}" / "networks" / name)).configs
    rates = json.loads((out / "runs/seed-1/decoder_captions/config.json").read_text())["objective"]
    assert (rates["image_drop_prob"], rates["text_drop_prob"]) == (1.0, 0.2)
    epsilon = Bundle.load(str(out / "seed-0/networks/prior_epsilon")).configs["prior"]
    assert epsilon.diffusion.prediction_type == "epsilon"
    assert (
        DecoderObjectiveConfig.model_fields["text_drop_prob"].default == 0.5
    )  # the paper's, of NETWORKS["decoder"] too
    assert NETWORKS["decoder"].changes["text_drop_prob"] == 0.5


def test_both_priors_train_for_the_same_flops(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    step = result["flops"]["ar_prior"] / result["steps"]["ar_prior"]
    assert abs(result["flops"]["ar_prior"] - result["flops"]["prior"]) <= step / 2


def test_metrics_of_embeddings_are_those_of_the_drawn_ones(out: Path) -> None:
    """Written out anew: cosines to the z_i of the caption's own picture, and Fréchet's distance by a matrix root."""
    manifest = scan(str(out / "embedded/heldout"))
    table = read_slices(manifest, [(0, 0, manifest.rows)], ("image_embed",))
    real = np.array(table.column("image_embed").to_pylist())
    real /= np.linalg.norm(real, axis=1, keepdims=True)
    drawn = load_file(out / "seed-1/drawn/epsilon.safetensors")["image_embed"].double().numpy()
    assert drawn.shape == (8, 16)
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    measured = json.loads((out / "seed-1/measured/epsilon.json").read_text())
    pairs = [float(drawn[row] @ real[row // 2]) for row in range(8)]
    assert measured["cosine"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert measured["diversity"] == pytest.approx(
        np.mean([1 - drawn[2 * i] @ drawn[2 * i + 1] for i in range(4)]), rel=1e-4
    )
    covariances = [np.cov(of, rowvar=False) for of in (drawn, real)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    distance = ((drawn.mean(0) - real.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert measured["frechet"] == pytest.approx(distance, rel=1e-2)


def test_one_draw_is_the_first_of_the_two(out: Path) -> None:
    one, two = (
        load_file(out / f"seed-0/drawn/{name}.safetensors")["image_embed"] for name in ("one_draw", "diffusion")
    )
    kept = torch.isclose(one, two, atol=1e-5).all(dim=1)
    assert 0 < kept.sum() < len(kept)


def test_the_result_is_made_of_the_measurements(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    claim = result["findings"][0]["claims"][0]
    per_seed = [
        [json.loads((out / f"seed-{seed}/measured/{name}.json").read_text())["frechet"] for seed in range(2)]
        for name in ("unclip", "text_embedding")
    ]
    assert [claim["below"], claim["above"]] == per_seed
    differences = np.subtract(per_seed[1], per_seed[0])
    assert claim["difference"]["mean"] == pytest.approx(differences.mean())
    half = (
        math.tan(math.pi * 0.475) * abs(differences[0] - differences[1]) / 2
    )  # Student's t with one degree of freedom
    assert claim["difference"]["low"] == pytest.approx(differences.mean() - half)
    page = (out / "report.html").read_text()
    assert claim["claim"] in page
    assert page.count("data:image/png") == 1 + len(PICTURES)


def test_what_is_missing_is_made_again_and_nothing_else(config: ReproduceConfig, out: Path) -> None:
    missing = [out / "seed-1/measured/glide.json", out / "seed-0/measured/one_draw.json", out / "result.json"]
    before = {path: path.read_bytes() for path in missing}
    for path in missing:
        path.unlink()
    kept = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("model.safetensors", "unclip.json")
    }
    job = Reproduction(config)
    assert [step.name for step in job.steps if not step.is_done] == ["one_draw, seed 0", "glide, seed 1"]
    job.run()
    assert {path: path.read_bytes() for path in missing} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_reproduction_is_refused_and_more_seeds_are_not(config: ReproduceConfig, out: Path) -> None:
    with pytest.raises(ConfigError, match="begun with another captions, decoder"):
        Reproduction(config.merged({"captions": 3, "decoder": {"loop": {"max_steps": 3}}}))
    more = [step.name for step in Reproduction(config.merged({"seeds": 3})).steps if not step.is_done]
    assert len(more) == len(NETWORKS) + len(EMBEDDINGS) + len(PICTURES)
    assert all(name.endswith("seed 2") for name in more)


def test_networks_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder.objective.stage.model.embed_dim = 32: must be .* = 16"):
        debug().merged({"decoder": {"objective": {"stage": {"model": {"embed_dim": 32}}}}})
    with pytest.raises(ConfigError, match=r"prior.objective.kind = 'ar_prior': must be 'prior'"):
        debug().merged({"prior": debug().ar_prior.to_dict()})
