"""Recipes of `upsampler_1024`: 256 to 1024 pixels."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.diffusion.process import DiffusionConfig, PredictionType
from unclip.diffusion.samplers import SamplingConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.pipelines.stages import UpsamplerStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig
from unclip.training.optim import OptimizerConfig


def objective(
    unet: UNetConfig,
    sampling: SamplingConfig,
    *,
    prediction_type: PredictionType = "epsilon",
    degradation_prob: float = 1.0,
    crop_fraction: float = 0.25,
) -> UpsamplerObjectiveConfig:
    """The paper's stage (§2.1, Table 3): linear schedule, quarter crops, BSR degradation on the condition."""
    return UpsamplerObjectiveConfig(
        stage=UpsamplerStageConfig(
            kind="upsampler_1024",
            model=UpsamplerConfig(unet=unet),
            diffusion=DiffusionConfig(beta_schedule="linear", prediction_type=prediction_type, clip_sample_range=1.0),
            sampling=sampling,
            low_res_size=256,
            image_size=1024,
        ),
        degradation="bsr",
        degradation_prob=degradation_prob,
        crop_fraction=crop_fraction,
    )


def debug() -> TrainConfig:
    unet = UNetConfig(in_channels=6, channels=16, channel_mult=(1, 2), depth=1, patch_size=8, image_size=1024)
    return TrainConfig(
        stage="upsampler_1024",
        recipe="debug",
        run=shared.run_folder("debug", "upsampler_1024"),
        bundle=shared.bundle("debug"),
        data=TrainDataConfig(path=shared.openmoji(1024), shuffle_rows=64),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=2)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    """Predicts the picture instead of the noise, for the reason that the demo's decoder does.

    What little it learns in a minute is colours: so only a fifth of the crops is degraded, and they have half the paper's
    side, twice as many a step, since colours want variety.
    """
    unet = UNetConfig(in_channels=6, channels=48, channel_mult=(1, 2), depth=1, patch_size=8, image_size=1024)
    return TrainConfig(
        stage="upsampler_1024",
        recipe="demo",
        run=shared.run_folder("demo", "upsampler_1024"),
        bundle=shared.bundle("demo"),
        data=TrainDataConfig(path=shared.openmoji(1024), shuffle_rows=256),
        objective=objective(
            unet,
            SamplingConfig(sampler="ddim", num_inference_steps=8),
            prediction_type="sample",
            degradation_prob=0.2,
            crop_fraction=0.125,
        ),
        optimizer=shared.demo_optimizer(4e-3),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=8, time_limit_s=50.0),
    )


def small() -> TrainConfig:
    unet = UNetConfig(in_channels=6, channels=96, channel_mult=(1, 1, 2, 2, 4, 4), depth=2, image_size=1024)
    return TrainConfig(
        stage="upsampler_1024",
        recipe="small",
        run=shared.run_folder("small", "upsampler_1024"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path="", shuffle_rows=4096),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=15)),
        optimizer=OptimizerConfig(learning_rate=1e-4, grad_clip=1.0, warmup_steps=1000),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=200_000, global_batch_size=64, microbatch_size=32, time_limit_s=3 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=14),
    )


def paper() -> TrainConfig:
    """Table 3: 300M, batch 512, 1M steps, learning rate 1e-4, no dropout, 15 DDIM steps.

    AdaGN gives 282M parameters, additive conditioning 267M: the former is nearer to the paper's count.
    """
    unet = UNetConfig(in_channels=6, channels=192, channel_mult=(1, 1, 2, 2, 4, 4), depth=2, image_size=1024)
    return TrainConfig(
        stage="upsampler_1024",
        recipe="paper",
        run=shared.run_folder("paper", "upsampler_1024"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=15)),
        optimizer=OptimizerConfig(learning_rate=1e-4, ema_decay=0.9999, ema_warmup=False),
        zero=ZeroConfig(stage=1, precision="bf16"),
        loop=LoopConfig(max_steps=1_000_000, global_batch_size=512, microbatch_size=8),
        resources=ResourcesConfig(num_workers=64, use_gpu="yes", data_cpus=512),
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
