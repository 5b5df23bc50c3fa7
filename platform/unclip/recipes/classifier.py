"""Recipes of the noised `classifier`, each for the decoder of the same name: its picture size and its noise."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.schedules import BetaSchedule
from unclip.models.classifier import ClassifierConfig
from unclip.models.unet import UNetConfig
from unclip.pipelines.stages import ClassifierStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.training.optim import OptimizerConfig


def objective(
    encoder: UNetConfig,
    *,
    label_column: str = "label",
    classes: tuple[str, ...] = (),
    beta_schedule: BetaSchedule = "squaredcos_cap_v2",
) -> ClassifierObjectiveConfig:
    """On 1000 steps of noise, cosine unless the decoder's are others (unCLIP, Table 3; ADM too at 64 pixels)."""
    return ClassifierObjectiveConfig(
        stage=ClassifierStageConfig(
            model=ClassifierConfig(encoder=encoder),
            diffusion=DiffusionConfig(beta_schedule=beta_schedule),
            label_column=label_column,
            classes=classes,
        )
    )


def debug() -> TrainConfig:
    """By OpenMoji's column of colours, which says "none" of most drawings; so do the demo's."""
    encoder = UNetConfig(
        channels=16,
        channel_mult=(1, 2),
        depth=1,
        attention_resolutions=(8,),
        head_channels=16,
        patch_size=4,
        image_size=64,
    )
    return TrainConfig(
        stage="classifier",
        recipe="debug",
        run=shared.run_folder("debug", "classifier"),
        bundle=shared.bundle("debug"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=256),
        objective=objective(encoder, label_column="colour"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    encoder = UNetConfig(
        channels=64,
        channel_mult=(1, 2),
        depth=1,
        attention_resolutions=(8,),
        head_channels=32,
        patch_size=4,
        image_size=64,
    )
    return TrainConfig(
        stage="classifier",
        recipe="demo",
        run=shared.run_folder("demo", "classifier"),
        bundle=shared.bundle("demo"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=4096),
        objective=objective(encoder, label_column="colour", beta_schedule="linear"),
        optimizer=shared.demo_optimizer(1e-3, weight_decay=0.05),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=64, time_limit_s=60.0),
    )


def small() -> TrainConfig:
    """ADM's classifier with two blocks a level, as it is for pictures above 64 pixels, and their batch of 256."""
    return TrainConfig(
        stage="classifier",
        recipe="small",
        run=shared.run_folder("small", "classifier"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=objective(adm_encoder(depth=2)),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, weight_decay=0.05, grad_clip=1.0, ema_decay=0.999, lr_schedule="cosine"
        ),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=300_000, global_batch_size=256, microbatch_size=256, time_limit_s=6 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=8),
    )


def paper() -> TrainConfig:
    """ADM's ImageNet classifier for 64 pixels (Dhariwal and Nichol 2021, appendix): 300K steps of 1024 pictures.

    Learning rate and weight decay are those of its published training command. ADM lets the rate fall linearly to 0 and
    keeps no average of the weights, for which our closest are half a cosine and a short one.
    """
    return TrainConfig(
        stage="classifier",
        recipe="paper",
        run=shared.run_folder("paper", "classifier"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=objective(adm_encoder(depth=4), classes=tuple(map(str, range(1000)))),
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.05, ema_decay=0.99, lr_schedule="cosine"),
        zero=ZeroConfig(stage=1, precision="bf16"),
        loop=LoopConfig(max_steps=300_000, global_batch_size=1024, microbatch_size=128),
        resources=ResourcesConfig(num_workers=8, use_gpu="yes", data_cpus=64),
    )


def adm_encoder(*, depth: int) -> UNetConfig:
    """ADM's for 64 pixels: 128 channels, four levels, attention at 32, 16 and 8."""
    return UNetConfig(
        channels=128, channel_mult=(1, 2, 3, 4), depth=depth, attention_resolutions=(32, 16, 8), image_size=64
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
