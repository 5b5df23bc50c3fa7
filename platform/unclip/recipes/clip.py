"""Recipes of the `clip` stage. Most users bring an open_clip checkpoint instead."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.models.clip import ClipArchitectureConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.optim import OptimizerConfig


def tiny_architecture() -> ClipArchitectureConfig:
    """The least that is still a CLIP; for tests."""
    return ClipArchitectureConfig(
        embed_dim=16,
        image_size=32,
        vision_layers=1,
        vision_width=32,
        vision_patch_size=16,
        vision_head_width=16,
        context_length=16,
        text_width=32,
        text_heads=2,
        text_layers=1,
    )


def debug() -> TrainConfig:
    return TrainConfig(
        stage="clip",
        recipe="debug",
        run=shared.run_folder("debug", "clip"),
        bundle=shared.bundle("debug"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=256),
        objective=ClipObjectiveConfig(architecture=tiny_architecture()),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    return TrainConfig(
        stage="clip",
        recipe="demo",
        run=shared.run_folder("demo", "clip"),
        bundle=shared.bundle("demo"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=2048),
        objective=ClipObjectiveConfig(
            architecture=ClipArchitectureConfig(
                embed_dim=128,
                image_size=64,
                vision_layers=4,
                vision_width=128,
                vision_patch_size=16,
                vision_head_width=32,
                context_length=24,
                text_width=128,
                text_heads=4,
                text_layers=2,
            )
        ),
        optimizer=shared.demo_optimizer(1e-3, weight_decay=0.1),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=128, time_limit_s=50.0),
    )


def small() -> TrainConfig:
    """A ViT-S/16-size CLIP for data far from photographs; otherwise take a pretrained one."""
    return TrainConfig(
        stage="clip",
        recipe="small",
        run=shared.run_folder("small", "clip"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=ClipObjectiveConfig(
            architecture=ClipArchitectureConfig(
                embed_dim=512,
                image_size=128,
                vision_layers=12,
                vision_width=384,
                vision_patch_size=16,
                vision_head_width=64,
                context_length=77,
                text_width=384,
                text_heads=6,
                text_layers=12,
            )
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.2,
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
    """Appendix C: ViT-H/16 at 256 px and a 24-layer text encoder of width 1024, learning rate 3e-4, SAM with rho 0.1.

    Batch 32,768, weight decay 0.2, beta2 0.98, eps 1e-6, cosine decay after 2,000 steps of warm-up are CLIP's (Radford et
    al. 2021, Table 18 and 19), to which the paper refers. It does not give the length: chosen are CLIP's 32 epochs over the
    650M pairs. The joint dimension 1024 is that of z_i in section 2.2.
    """
    batch, pairs, epochs = 32_768, 650_000_000, 32
    return TrainConfig(
        stage="clip",
        recipe="paper",
        run=shared.run_folder("paper", "clip"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=ClipObjectiveConfig(
            architecture=ClipArchitectureConfig(
                embed_dim=1024,
                image_size=256,
                vision_layers=32,
                vision_width=1280,
                vision_patch_size=16,
                vision_head_width=80,
                context_length=77,
                text_width=1024,
                text_heads=16,
                text_layers=24,
            ),
            sam_rho=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.2,
            ema_decay=0.9999,
            lr_schedule="cosine",
            warmup_steps=2000,
        ),
        # Float32 weights: the step of rho along the gradient is less than bfloat16 resolves in most of them.
        zero=ZeroConfig(stage=2, precision="autocast"),
        loop=LoopConfig(max_steps=pairs * epochs // batch, global_batch_size=batch, microbatch_size=64),
        resources=ResourcesConfig(num_workers=512, use_gpu="yes", data_cpus=2048),
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
