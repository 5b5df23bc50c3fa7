"""Configurations of dalle2-pytorch: what they come to fits our jobs, and no field is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unclip.interop.convert import ConvertConfig, run_convert
from unclip.interop.dalle2_pytorch import read_settings
from unclip.interop.keys import InteropError
from unclip.recipes.decoder import small as small_decoder
from unclip.recipes.prior import small as small_prior
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig

PRIOR: dict[str, Any] = {
    "prior": {
        "clip": {"make": "openai", "model": "ViT-L/14"},
        "net": {
            "dim": 768,
            "depth": 12,
            "max_text_len": 77,
            "dim_head": 64,
            "heads": 12,
            "ff_mult": 4,
            "rotary_emb": True,
        },
        "image_embed_dim": 768,
        "timesteps": 1000,
        "sample_timesteps": 64,
        "cond_drop_prob": 0.2,
        "loss_type": "l2",
        "predict_x_start": True,
        "beta_schedule": "cosine",
    },
    "data": {"batch_size": 128, "image_url": "s3://bucket/embeddings"},
    "train": {"lr": 2e-4, "wd": 0.06, "max_grad_norm": 0.5, "ema_beta": 0.999, "warmup_steps": 50, "epochs": 5},
}
DECODER: dict[str, Any] = {
    "decoder": {
        "unets": [
            {
                "dim": 128,
                "image_embed_dim": 768,
                "dim_mults": [1, 2, 4],
                "attn_dim_head": 32,
                "attn_heads": 16,
                "self_attn": [False, True, True],
            },
            {"dim": 64, "dim_mults": [1, 2]},
        ],
        "image_sizes": [64, 256],
        "beta_schedule": ["cosine", "linear"],
        "learned_variance": True,
        "image_cond_drop_prob": 0.2,
    },
    "train": {"lr": [1e-4, 2e-4]},
}


def written(tmp_path: Path, content: Mapping[str, Any]) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


def leaves(value: object) -> int:
    return sum(map(leaves, value.values())) if isinstance(value, dict) else 1


def test_prior_configuration_fits_our_job(tmp_path: Path) -> None:
    part, settings, account = read_settings(written(tmp_path, PRIOR))
    config = small_prior().merged(settings)
    assert part == config.stage == "prior"
    objective = config.objective
    assert isinstance(objective, PriorObjectiveConfig)
    stage = objective.stage
    assert (stage.model.width, stage.model.depth, stage.model.heads, stage.model.context_length) == (768, 12, 12, 77)
    assert (stage.diffusion.prediction_type, stage.diffusion.beta_schedule) == ("sample", "squaredcos_cap_v2")
    assert (stage.sampling.sampler, stage.sampling.num_inference_steps) == ("ddim", 64)
    assert objective.text_drop_prob == 0.2
    assert (config.clip, config.loop.microbatch_size) == ("ViT-L-14-quickgelu/openai", 128)
    assert (config.optimizer.learning_rate, config.optimizer.ema_decay, config.optimizer.warmup_steps) == (
        2e-4,
        0.999,
        50,
    )
    # Unit-norm embeddings are diffused there times the root of their width.
    assert f"std {768**-0.5:.6g}" in account.dropped["image_embed_scale"]
    assert "learned positions" in account.dropped["prior.net.rotary_emb"]


def test_decoder_configuration_fits_our_job(tmp_path: Path) -> None:
    part, settings, account = read_settings(written(tmp_path, DECODER))
    config = small_decoder().merged(settings)
    assert part == config.stage == "decoder"
    objective = config.objective
    assert isinstance(objective, DecoderObjectiveConfig)
    unet = objective.stage.model.unet
    assert (unet.channels, unet.channel_mult, unet.attention_resolutions, unet.head_channels) == (
        128,
        (1, 2, 4),
        (32, 16),
        32,
    )
    assert (objective.stage.model.text, objective.stage.model.embed_dim) == (None, 768)
    assert (objective.image_drop_prob, config.optimizer.learning_rate) == (0.2, 1e-4)
    # Without sample_timesteps theirs takes every step there is.
    sampling, diffusion = objective.stage.sampling, objective.stage.diffusion
    assert (sampling.sampler, sampling.num_inference_steps, diffusion.prediction_type) == ("ddpm", 1000, "epsilon")
    assert "stages of their own" in account.dropped["decoder.unets.1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"predict_x_start": [True, False]}, "sample"),
        ({"predict_v": True, "predict_x_start": True}, "v_prediction"),
    ],
)
def test_what_a_decoder_predicts(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    content = {**DECODER, "decoder": {**DECODER["decoder"], **changes}}
    _, settings, account = read_settings(written(tmp_path, content))
    assert small_decoder().merged(settings).objective.stage.diffusion.prediction_type == expected
    assert not any("predict" in name for name in account.dropped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prior": {"net": {"depth": 2}}}, r"prior\.net\.dim = None: must be a number"),
        ({"prior": {**PRIOR["prior"], "timesteps": "many"}}, r"prior\.timesteps = 'many': must be a number"),
        ({"decoder": {"unets": [3]}}, r"decoder\.unets = \[3\]: must be a list of U-Nets"),
        ({"decoder": {"unets": [{"dim": 16}]}}, r"decoder\.unets\.0\.dim_mults = None: must be list"),
    ],
)
def test_what_is_no_configuration_is_refused_by_its_field(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(InteropError, match=message):
        read_settings(written(tmp_path, content))


@pytest.mark.parametrize(
    "content", [PRIOR, {**PRIOR, "wings": {"left": 1}}, {**PRIOR, "prior": {**PRIOR["prior"], "odd": 1}}]
)
def test_no_field_is_lost(tmp_path: Path, content: dict[str, Any]) -> None:
    _, _, account = read_settings(written(tmp_path, content))
    noted = {"image_embed_scale", "global batch"}  # of what their files do not say
    assert account.taken + len(account.dropped.keys() - noted) == leaves(content)


def test_heads_that_ours_cannot_have_are_named(tmp_path: Path) -> None:
    net = {**PRIOR["prior"]["net"], "heads": 8}
    _, settings, account = read_settings(written(tmp_path, {**PRIOR, "prior": {**PRIOR["prior"], "net": net}}))
    assert "heads" not in settings["objective"]["stage"]["model"]
    assert "8 heads of 64 are not its width 768" in account.dropped["prior.net.heads"]


def test_convert_writes_what_config_takes(tmp_path: Path) -> None:
    path, out = written(tmp_path, PRIOR), tmp_path / "prior.yaml"
    list(run_convert(ConvertConfig(source=str(path), kind="dalle2_pytorch", out=str(out)), dry_run=True))
    assert not out.exists()
    list(run_convert(ConvertConfig(source=str(path), kind="dalle2_pytorch", out=str(out))))
    assert yaml.safe_load(out.read_text()) == read_settings(path)[1]


def test_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"net.causal_transformer": torch.zeros(1)}, tmp_path / "prior.pth")
    with pytest.raises(InteropError, match=r"only dalle2-pytorch's configurations \(JSON\).*SwiGLU"):
        read_settings(tmp_path / "prior.pth")
    with pytest.raises(InteropError, match="section prior or decoder"):
        read_settings(written(tmp_path, {"train": {}}))
