from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from unclip.config.base import ConfigError
from unclip.pipelines.stages import StageConfig, stage_config_from_dict


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("prior", {"diffusion": {"variance_type": "learned_range"}}, "diffusion.variance_type = 'learned_range'"),
        ("prior", {"sampling": {"num_inference_steps": 51}}, "num_train_timesteps = 50, not 51"),
        ("prior", {"normalizer": {"mean": [0.0] * 7}}, "normalizer.mean: has 7 numbers for model.embed_dim = 8"),
        ("prior", {"num_draws": 0}, "num_draws = 0"),
        ("decoder", {"normalizer": {"std": [1.0] * 9}}, "normalizer.std: has 9 numbers for model.embed_dim = 8"),
        (
            "decoder",
            {"diffusion": {"variance_type": "fixed_small"}},
            "out_channels = 6: must be 3 with .*'fixed_small'",
        ),
        ("decoder", {"model": {"unet": {"out_channels": 3}}}, "out_channels = 3: must be 6 with .*'learned_range'"),
        ("decoder", {"model": {"unet": {"in_channels": 6}}}, "in_channels = 6: must be 3"),
        ("decoder", {"image_size": 32}, "model.unet.image_size = 16: must be image_size = 32"),
        ("decoder", {"model": {"inpainting": True}}, "in_channels = 3: must be 7"),
        ("decoder", {"model": {"num_classes": 2}}, "classes: has 0 names for model.num_classes = 2"),
        ("decoder", {"classes": ["cat"]}, "classes: has 1 names for model.num_classes = None"),
        (
            "decoder",
            {"model": {"num_classes": 1}, "classes": ["cat"]},
            "label_column = None: goes with model.num_classes = 1",
        ),
        ("decoder", {"model": {"text": None, "embed_dim": None}}, "a decoder needs at least one input"),
        ("upsampler_256", {"low_res_noise_level": 1}, "low_res_noise_level = 1: must be below 1 with"),
        (
            "upsampler_256",
            {"low_res_noise_level": 50, "model": {"noise_conditioning": True}},
            "low_res_noise_level = 50: must be below 50 with",
        ),
        ("upsampler_256", {"sampling": {"guidance_scale": 2.0}}, "sampling.guidance_scale = 2.0: an upsampler"),
        ("upsampler_256", {"model": {"unet": {"in_channels": 3}}}, "in_channels = 3: must be 6"),
        ("upsampler_256", {"image_size": 33}, "image_size = 33: must be a multiple of 2"),
        ("upsampler_256", {"low_res_size": 12}, "image_size = 32: must be a multiple of low_res_size = 12"),
        ("upsampler_256", {"low_res_size": 32}, "image_size = 32: must be .* and larger"),
        ("upsampler_256", {"kind": "upsampler_512"}, "kind = 'upsampler_512'"),
    ],
)
def test_contradictions_are_refused(
    tiny_configs: Mapping[str, StageConfig], name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_configs[name].merged(changes)


def test_configs_survive_json(tiny_configs: Mapping[str, StageConfig]) -> None:
    for config in tiny_configs.values():
        assert stage_config_from_dict(config.to_dict()) == config


def test_the_kind_must_be_known() -> None:
    with pytest.raises(
        ConfigError, match="kind = 'painter': must be one of clip, noised_clip, classifier, prior, decoder"
    ):
        stage_config_from_dict({"kind": "painter"})
