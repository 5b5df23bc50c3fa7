"""Recipes of the autoregressive `prior`: `ar_debug`, `ar_demo`, `ar_small` and `ar_paper` beside those of the diffusion prior.

Each goes into the bundle of its size, where it takes the place of a diffusion prior: a cascade has one prior. Their
principal components are those that `jobs/embed.py` writes beside the embeddings.
"""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.models.ar_prior import ARPriorConfig
from unclip.pipelines.stages import ARPriorStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.optim import OptimizerConfig

_OPENMOJI = shared.openmoji(64, embedded=True)
_OPENMOJI_PCA = f"{_OPENMOJI}/pca.safetensors"


def debug() -> TrainConfig:
    model = ARPriorConfig(embed_dim=16, num_components=8, num_buckets=32, context_length=16, width=32, depth=1, heads=2)
    return TrainConfig(
        stage="prior",
        recipe="ar_debug",
        run="runs/debug/ar_prior",
        bundle=shared.bundle("debug"),
        clip=f"{shared.bundle('debug')}/clip",
        data=TrainDataConfig(path=_OPENMOJI, shuffle_rows=256),
        objective=ARPriorObjectiveConfig(stage=ARPriorStageConfig(model=model), pca=_OPENMOJI_PCA),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    """Coarser buckets than the paper's: a minute of training sees each of 1024 too rarely.

    48 components leave 1% of the variance of this CLIP's embeddings, as the paper's 319 do.
    """
    model = ARPriorConfig(
        embed_dim=128, num_components=48, num_buckets=64, context_length=24, width=128, depth=4, heads=4
    )
    return TrainConfig(
        stage="prior",
        recipe="ar_demo",
        run="runs/demo/ar_prior",
        bundle=shared.bundle("demo"),
        clip=f"{shared.bundle('demo')}/clip",
        data=TrainDataConfig(path=_OPENMOJI, shuffle_rows=4096),
        objective=ARPriorObjectiveConfig(stage=ARPriorStageConfig(model=model), pca=_OPENMOJI_PCA),
        optimizer=shared.demo_optimizer(1e-3),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=128, time_limit_s=45.0),
    )


def small() -> TrainConfig:
    """A 250M prior for ViT-L/14-size embeddings."""
    model = ARPriorConfig(embed_dim=768, num_components=256, context_length=77, width=1024, depth=16, heads=16)
    return TrainConfig(
        stage="prior",
        recipe="ar_small",
        run="runs/small/ar_prior",
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=ARPriorObjectiveConfig(stage=ARPriorStageConfig(model=model)),
        optimizer=OptimizerConfig(
            learning_rate=1.6e-4,
            beta2=0.91,
            eps=1e-10,
            weight_decay=4e-2,
            ema_decay=0.999,
            grad_clip=1.0,
            warmup_steps=1000,
        ),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=200_000, global_batch_size=1024, microbatch_size=256, time_limit_s=4 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=8),
    )


def paper() -> TrainConfig:
    """Table 3: width 2048, depth 24, batch 4096, 1M steps, learning rate 1.6e-4, beta2 0.91, eps 1e-10, decay 4e-2.

    319 of 1024 dimensions (§2.2). The table also has a "latent decoder" of width 1664 and context 384, of which the text
    says nothing; this is the text's one transformer, with the caption as its prefix, of the table's text encoder's
    shape. The paper gives neither warm-up nor clipping.
    """
    model = ARPriorConfig(
        embed_dim=1024,
        num_components=319,
        num_buckets=1024,
        context_length=256,
        width=2048,
        depth=24,
        heads=32,
        activation_checkpointing=True,
    )
    return TrainConfig(
        stage="prior",
        recipe="ar_paper",
        run="runs/paper/ar_prior",
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=ARPriorObjectiveConfig(stage=ARPriorStageConfig(model=model)),
        optimizer=OptimizerConfig(
            learning_rate=1.6e-4, beta2=0.91, eps=1e-10, weight_decay=4e-2, ema_decay=0.999, ema_warmup=False
        ),
        zero=ZeroConfig(stage=2, precision="bf16"),
        loop=LoopConfig(max_steps=1_000_000, global_batch_size=4096, microbatch_size=64),
        resources=ResourcesConfig(num_workers=64, use_gpu="yes", data_cpus=128),
    )


RECIPES = {"ar_demo": demo, "ar_debug": debug, "ar_small": small, "ar_paper": paper}
