"""Recipes of `upsampler_256`: 64 to 256 pixels."""

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
    degradation_prob: float = 0.5,
) -> UpsamplerObjectiveConfig:
    """The paper's stage (§2.1, Table 3): cosine schedule, quarter crops, Gaussian blur on the condition.

    How often to blur is not given; cascaded diffusion (Ho et al. 2021), where the blur comes from, does it half the time.
    """
    return UpsamplerObjectiveConfig(
        stage=UpsamplerStageConfig(
            kind="upsampler_256",
            model=UpsamplerConfig(unet=unet),
            diffusion=DiffusionConfig(
                beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample_range=1.0
            ),
            sampling=sampling,
            low_res_size=64,
            image_size=256,
        ),
        degradation="blur",
        degradation_prob=degradation_prob,
    )


def debug() -> TrainConfig:
    unet = UNetConfig(in_channels=6, channels=16, channel_mult=(1, 2), depth=1, patch_size=4, image_size=256)
    return TrainConfig(
        stage="upsampler_256",
        recipe="debug",
        run=shared.run_folder("debug", "upsampler_256"),
        bundle=shared.bundle("debug"),
        data=TrainDataConfig(path=shared.openmoji(256), shuffle_rows=256),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=2)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    """Predicts the picture instead of the noise, for the reason that the demo's decoder does."""
    unet = UNetConfig(in_channels=6, channels=48, channel_mult=(1, 2), depth=1, patch_size=4, image_size=256)
    return TrainConfig(
        stage="upsampler_256",
        recipe="demo",
        run=shared.run_folder("demo", "upsampler_256"),
        bundle=shared.bundle("demo"),
        data=TrainDataConfig(path=shared.openmoji(256), shuffle_rows=1024),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=12), prediction_type="sample"),
        optimizer=shared.demo_optimizer(4e-3),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=16, time_limit_s=60.0),
    )


def small() -> TrainConfig:
    unet = UNetConfig(in_channels=6, channels=128, channel_mult=(1, 2, 3, 4), depth=2, dropout=0.1, image_size=256)
    return TrainConfig(
        stage="upsampler_256",
        recipe="small",
        run=shared.run_folder("small", "upsampler_256"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=27, timestep_spacing="fast27")),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, grad_clip=1.0, warmup_steps=1000),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=300_000, global_batch_size=256, microbatch_size=256, time_limit_s=5 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=12),
    )


def paper() -> TrainConfig:
    """Table 3: 700M, batch 1024, 1M steps, learning rate 1.2e-4, dropout 0.1, 27 DDIM steps (GLIDE's fast27).

    The parameter count is met by additive time conditioning (691M; AdaGN would have 730M).
    """
    unet = UNetConfig(
        in_channels=6,
        channels=320,
        channel_mult=(1, 2, 3, 4),
        depth=3,
        dropout=0.1,
        scale_shift_norm=False,
        image_size=256,
    )
    return TrainConfig(
        stage="upsampler_256",
        recipe="paper",
        run=shared.run_folder("paper", "upsampler_256"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=objective(unet, SamplingConfig(sampler="ddim", num_inference_steps=27, timestep_spacing="fast27")),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, ema_decay=0.9999, ema_warmup=False),
        zero=ZeroConfig(stage=1, precision="bf16"),
        loop=LoopConfig(max_steps=1_000_000, global_batch_size=1024, microbatch_size=16),
        resources=ResourcesConfig(num_workers=64, use_gpu="yes", data_cpus=256),
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
