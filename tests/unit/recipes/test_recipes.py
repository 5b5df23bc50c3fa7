"""Recipes against the paper's table (Ramesh et al. 2022, Table 3 and appendix C), and against what they were yesterday."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip.pipelines.stages import ClassifierStageConfig
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig

GOLDEN = Path(__file__).parents[2] / "golden"
UPDATE = "UNCLIP_UPDATE_GOLDEN"
ALL = [(stage, name) for stage, recipes in RECIPES.items() for name in recipes]

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
EMA = {"ema_decay": 0.9999, "ema_warmup": False}
COSINE, LINEAR = {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "linear"}
TEXT_ENCODER = {"context_length": 256, "width": 2048, "depth": 24, "heads": 32}
NO_ATTENTION: dict[str, Any] = {"attention_resolutions": []}

PAPER: dict[str, dict[str, Any]] = {
    "prior": {
        "objective": {
            "text_drop_prob": 0.1,
            "normalization": "scale",
            "stage": {
                "num_draws": 2,
                "diffusion": {"num_train_timesteps": 1000, "prediction_type": "sample", **COSINE},
                "sampling": {"num_inference_steps": 64, "sampler": "ddpm", "guidance_scale": 1.0},
                "model": {"embed_dim": 1024, **TEXT_ENCODER},
                "normalizer": {"mean": 0.0, "std": 1 / 17.2},
            },
        },
        "optimizer": {"learning_rate": 1.1e-4, "beta1": 0.9, "beta2": 0.96, "eps": 1e-6, "weight_decay": 6e-2, **EMA},
        "loop": {"global_batch_size": 4096, "max_steps": 600_000},
    },
    "decoder": {
        "objective": {
            "image_drop_prob": 0.1,
            "text_drop_prob": 0.5,
            "normalization": "scale",
            "stage": {
                "image_size": 64,
                "diffusion": {
                    "num_train_timesteps": 1000,
                    "prediction_type": "epsilon",
                    "variance_type": "learned_range",
                    **COSINE,
                },
                "sampling": {"num_inference_steps": 250, "sampler": "ddpm", "guidance_scale": 1.25},
                "model": {
                    "embed_dim": 1024,
                    "num_image_tokens": 4,
                    "text": TEXT_ENCODER,
                    "unet": {
                        "channels": 512,
                        "depth": 3,
                        "channel_mult": [1, 2, 3, 4],
                        "head_channels": 64,
                        "attention_resolutions": [32, 16, 8],
                        "dropout": 0.1,
                    },
                },
                "normalizer": {"mean": 0.0, "std": 1 / 17.2},
            },
        },
        "optimizer": {"learning_rate": 1.2e-4, **ADAM, **EMA},
        "loop": {"global_batch_size": 2048, "max_steps": 800_000},
    },
    "upsampler_256": {
        "objective": {
            "crop_fraction": 0.25,
            "degradation": "blur",
            "stage": {
                "low_res_size": 64,
                "image_size": 256,
                "diffusion": {"num_train_timesteps": 1000, "prediction_type": "epsilon", **COSINE},
                "sampling": {"num_inference_steps": 27, "sampler": "ddim", "guidance_scale": 1.0},
                "model": {
                    "unet": {"channels": 320, "depth": 3, "channel_mult": [1, 2, 3, 4], "dropout": 0.1, **NO_ATTENTION}
                },
            },
        },
        "optimizer": {"learning_rate": 1.2e-4, **ADAM, **EMA},
        "loop": {"global_batch_size": 1024, "max_steps": 1_000_000},
    },
    "upsampler_1024": {
        "objective": {
            "crop_fraction": 0.25,
            "degradation": "bsr",
            "stage": {
                "low_res_size": 256,
                "image_size": 1024,
                "diffusion": {"num_train_timesteps": 1000, "prediction_type": "epsilon", **LINEAR},
                "sampling": {"num_inference_steps": 15, "sampler": "ddim", "guidance_scale": 1.0},
                "model": {
                    "unet": {
                        "channels": 192,
                        "depth": 2,
                        "channel_mult": [1, 1, 2, 2, 4, 4],
                        "dropout": 0.0,
                        **NO_ATTENTION,
                    }
                },
            },
        },
        "optimizer": {"learning_rate": 1.0e-4, **ADAM, **EMA},
        "loop": {"global_batch_size": 512, "max_steps": 1_000_000},
    },
    "clip": {
        "objective": {
            "sam_rho": 0.1,
            "architecture": {
                "embed_dim": 1024,
                "image_size": 256,
                "vision_layers": 32,
                "vision_width": 1280,
                "vision_patch_size": 16,
                "context_length": 77,
                "text_width": 1024,
                "text_layers": 24,
            },
        },
        "optimizer": {
            "learning_rate": 3e-4,
            "beta1": 0.9,
            "weight_decay": 0.2,
            "warmup_steps": 2000,
            "lr_schedule": "cosine",
        },
        # The perturbation of SAM is computed on each replica's own 64 pairs.
        "loop": {"global_batch_size": 32_768, "microbatch_size": 64},
    },
    "noised_clip": {  # GLIDE, section 4.4 and appendix
        "objective": {
            "stage": {
                "diffusion": {"num_train_timesteps": 1000, **COSINE},
                "model": {
                    "image_size": 64,
                    "patch_size": 4,
                    "width": 1024,
                    "depth": 24,
                    "heads": 16,
                    "text": {"width": 768, "depth": 12, "heads": 12},
                },
            }
        },
        "optimizer": {"weight_decay": 0.0125},
        "loop": {"global_batch_size": 32_768, "max_steps": 390_000},
    },
    "classifier": {  # ADM, appendix
        "objective": {
            "stage": {
                "diffusion": {"num_train_timesteps": 1000, **COSINE},
                "model": {
                    "encoder": {
                        "image_size": 64,
                        "channels": 128,
                        "depth": 4,
                        "channel_mult": [1, 2, 3, 4],
                        "head_channels": 64,
                        "attention_resolutions": [32, 16, 8],
                    }
                },
            }
        },
        "optimizer": {"learning_rate": 3e-4, "weight_decay": 0.05},
        "loop": {"global_batch_size": 1024, "max_steps": 300_000},
    },
}

MILLIONS = {
    "prior": 1225.9 - 1025 * 2048 / 1e6 + 49408 * 2048 / 1e6,  # diffusers' takes text states; ours has the vocabulary
    "decoder": 3554.9,
    "upsampler_256": 691.5,
    "upsampler_1024": 282.0,
    "clip": 986.1,  # open_clip's ViT-H-14: as wide and deep, with as many patches
    "noised_clip": 427.6 + 1.7,  # open_clip's ViT-L-14, whose patches become as many smaller ones; the timestep
    "classifier": 65.44,  # the paper rounds to 65
}
"""Parameters that the table's rows give with the public modules of GLIDE, ADM, diffusers and open_clip."""


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


@pytest.mark.parametrize(
    ("stage", "field", "expected"),
    [(stage, field, value) for stage, table in PAPER.items() for field, value in leaves(table).items()],
)
def test_paper_recipes_have_the_papers_numbers(stage: str, field: str, expected: Any) -> None:
    found = leaves(RECIPES[stage]["paper"]().to_dict())[field]  # type: ignore[index]
    assert found == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("stage", RECIPES)
def test_paper_recipes_have_the_tables_parameter_counts(stage: str) -> None:
    assert parameters(RECIPES[stage]["paper"]()) / 1e6 == pytest.approx(MILLIONS[stage], rel=0.005)  # type: ignore[index]


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_every_recipe_is_whole(stage: str, name: str) -> None:
    config = RECIPES[stage][name]()  # type: ignore[index]
    assert (config.stage, config.recipe) == (stage, name)
    assert TrainConfig.from_dict(json.loads(config.to_json())) == config
    assert parameters(config) > 0
    loop, workers = config.loop, config.resources.num_workers
    assert config.accumulation_steps * workers * loop.microbatch_size == loop.global_batch_size


def test_stages_of_one_size_fit_together() -> None:
    """Same CLIP width and same text length where stages meet, and each upsampler takes what the stage before makes."""
    for name in ("debug", "demo", "small", "paper"):
        stages: dict[str, Any] = {stage: recipes[name]().objective.stage_config() for stage, recipes in RECIPES.items()}
        assert stages["prior"].model.embed_dim == stages["decoder"].model.embed_dim
        if name != "small":  # made for a pretrained ViT-L/14 of width 768
            assert stages["clip"].architecture.embed_dim == stages["prior"].model.embed_dim
        assert stages["decoder"].image_size == stages["upsampler_256"].low_res_size
        assert stages["upsampler_256"].image_size == stages["upsampler_1024"].low_res_size
        assert len({recipes[name]().bundle for recipes in RECIPES.values()}) == 1
        assert len({recipes[name]().run for recipes in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_recipes_change_on_purpose_only(stage: str, name: str) -> None:
    path, found = GOLDEN / f"{stage}-{name}.json", RECIPES[stage][name]().to_json()  # type: ignore[index]
    if UPDATE in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    expected = leaves(json.loads(path.read_text())) if path.exists() else {}
    current = leaves(json.loads(found))
    changed = {
        key: (expected.get(key, "not there"), current.get(key, "not there"))
        for key in sorted(expected.keys() | current.keys())
        if expected.get(key, "not there") != current.get(key, "not there")
    }
    assert not changed, (
        f"recipe {name!r} of {stage!r} is not what {path.name} says (golden, now): {changed}. If that is meant: "
        f"{UPDATE}=1 pytest tests/unit/recipes, and commit tests/golden"
    )


def parameters(config: TrainConfig) -> int:
    """Of the model, built without memory; a classifier that takes its classes of its data gets two."""
    stage = config.objective.stage_config()
    if isinstance(stage, ClassifierStageConfig) and not stage.classes:
        stage = stage.merged({"classes": ["a", "b"]})
    with torch.device("meta"):
        model = stage.build()
    return sum(parameter.numel() for parameter in model.parameters())
