"""Recipes of the `noised_clip`, each for the decoder of the same name: its picture size and its noise."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.schedules import BetaSchedule
from unclip.models.noised_clip import NoisedClipConfig
from unclip.models.text import TextTransformerConfig
from unclip.pipelines.stages import NoisedClipStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.noised_clip import NoisedClipObjectiveConfig
from unclip.training.optim import OptimizerConfig


def objective(
    model: NoisedClipConfig, *, beta_schedule: BetaSchedule = "squaredcos_cap_v2"
) -> NoisedClipObjectiveConfig:
    """On 1000 steps of noise, cosine unless the decoder's are others (unCLIP, Table 3)."""
    diffusion = DiffusionConfig(beta_schedule=beta_schedule)
    return NoisedClipObjectiveConfig(stage=NoisedClipStageConfig(model=model, diffusion=diffusion))


def debug() -> TrainConfig:
    model = NoisedClipConfig(
        embed_dim=16,
        image_size=64,
        patch_size=16,
        width=32,
        depth=1,
        heads=2,
        text=TextTransformerConfig(context_length=16, width=16, depth=1, heads=2),
    )
    return TrainConfig(
        stage="noised_clip",
        recipe="debug",
        run=shared.run_folder("debug", "noised_clip"),
        bundle=shared.bundle("debug"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=256),
        objective=objective(model),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    model = NoisedClipConfig(
        embed_dim=128,
        image_size=64,
        patch_size=8,
        width=128,
        depth=4,
        heads=4,
        text=TextTransformerConfig(context_length=24, width=128, depth=2, heads=4),
    )
    return TrainConfig(
        stage="noised_clip",
        recipe="demo",
        run=shared.run_folder("demo", "noised_clip"),
        bundle=shared.bundle("demo"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=2048),
        objective=objective(model, beta_schedule="linear"),
        optimizer=shared.demo_optimizer(1e-3, weight_decay=0.1),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=128, time_limit_s=60.0),
    )


def small() -> TrainConfig:
    """A ViT-S with GLIDE's patches of 4 pixels and its weight decay; the rest as in the CLIP of this size."""
    model = NoisedClipConfig(
        embed_dim=512,
        image_size=64,
        patch_size=4,
        width=384,
        depth=12,
        heads=6,
        text=TextTransformerConfig(context_length=77, width=384, depth=12, heads=6),
    )
    return TrainConfig(
        stage="noised_clip",
        recipe="small",
        run=shared.run_folder("small", "noised_clip"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=objective(model),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.0125,
            grad_clip=1.0,
            ema_decay=0.999,
            lr_schedule="cosine",
            warmup_steps=2000,
        ),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=50_000, global_batch_size=4096, microbatch_size=4096, time_limit_s=6 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=8),
    )


def paper() -> TrainConfig:
    """GLIDE's (section 4.4 and appendix): a ViT-L with patches of 4 pixels, 390K steps of 32K pairs, weight decay 0.0125.

    GLIDE refers to CLIP for the rest: the text encoder of its ViT-L, and of its training (Radford et al. 2021, Table 20)
    learning rate 4e-4, beta2 0.98, eps 1e-6, cosine decay after 2,000 steps of warm-up. Every pair is contrasted with the
    whole batch, so a worker's share goes through the model at once.
    """
    model = NoisedClipConfig(
        embed_dim=768,
        image_size=64,
        patch_size=4,
        width=1024,
        depth=24,
        heads=16,
        text=TextTransformerConfig(context_length=77, width=768, depth=12, heads=12, activation_checkpointing=True),
        activation_checkpointing=True,
    )
    return TrainConfig(
        stage="noised_clip",
        recipe="paper",
        run=shared.run_folder("paper", "noised_clip"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=objective(model),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.0125,
            ema_decay=0.9999,
            lr_schedule="cosine",
            warmup_steps=2000,
        ),
        zero=ZeroConfig(stage=1, precision="bf16"),
        loop=LoopConfig(max_steps=390_000, global_batch_size=32_768, microbatch_size=128),
        resources=ResourcesConfig(num_workers=256, use_gpu="yes", data_cpus=1024),
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
