"""Recipes of the diffusion `prior`."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.models.normalizer import paper_scale
from unclip.models.prior import PriorConfig
from unclip.pipelines.stages import PriorStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.optim import OptimizerConfig


def stage(
    model: PriorConfig, *, num_train_timesteps: int = 1000, num_inference_steps: int = 64, guidance_scale: float = 1.0
) -> PriorStageConfig:
    """The paper's process (§2.2, Table 3): cosine schedule, z_i itself predicted, 64 ancestral steps, two draws.

    Guidance is off unless asked for: the paper found that guiding the prior hurts how pictures look (§5.5). The range to
    which predicted embeddings are clipped is not given; at the paper's scale a component of 5 is beyond nine deviations.
    """
    return PriorStageConfig(
        model=model,
        diffusion=DiffusionConfig(
            beta_schedule="squaredcos_cap_v2",
            num_train_timesteps=num_train_timesteps,
            prediction_type="sample",
            clip_sample_range=5.0,
        ),
        sampling=SamplingConfig(sampler="ddpm", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
        normalizer=paper_scale(model.embed_dim),
    )


def debug() -> TrainConfig:
    model = PriorConfig(embed_dim=16, context_length=16, width=32, depth=1, heads=2)
    return TrainConfig(
        stage="prior",
        recipe="debug",
        run=shared.run_folder("debug", "prior"),
        bundle=shared.bundle("debug"),
        clip=f"{shared.bundle('debug')}/clip",
        data=TrainDataConfig(path=shared.openmoji(64, embedded=True), shuffle_rows=256),
        objective=PriorObjectiveConfig(stage=stage(model, num_inference_steps=4)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    model = PriorConfig(embed_dim=128, context_length=24, width=128, depth=4, heads=4)
    return TrainConfig(
        stage="prior",
        recipe="demo",
        run=shared.run_folder("demo", "prior"),
        bundle=shared.bundle("demo"),
        clip=f"{shared.bundle('demo')}/clip",
        data=TrainDataConfig(path=shared.openmoji(64, embedded=True), shuffle_rows=4096),
        # A CLIP trained for a minute has directions of very different spread, which whitening evens out.
        objective=PriorObjectiveConfig(stage=stage(model), normalization="whiten"),
        optimizer=shared.demo_optimizer(1e-3),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=128, time_limit_s=45.0),
    )


def small() -> TrainConfig:
    """A 230M prior for ViT-L/14-size embeddings."""
    model = PriorConfig(embed_dim=768, context_length=77, width=1024, depth=16, heads=16)
    return TrainConfig(
        stage="prior",
        recipe="small",
        run=shared.run_folder("small", "prior"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=PriorObjectiveConfig(stage=stage(model)),
        optimizer=OptimizerConfig(
            learning_rate=1.1e-4, beta2=0.96, eps=1e-6, weight_decay=6e-2, grad_clip=1.0, warmup_steps=1000
        ),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=200_000, global_batch_size=1024, microbatch_size=1024, time_limit_s=4 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=8),
    )


def paper() -> TrainConfig:
    """Table 3: width 2048, depth 24, batch 4096, 600K steps, learning rate 1.1e-4, beta2 0.96, eps 1e-6, decay 6e-2.

    Sampling there uses analytic variance (Bao et al. 2022), which jobs/fit_analytic_variance.py measures of the trained
    prior; until then the posterior's stands in.
    The paper gives neither warm-up nor clipping.
    """
    model = PriorConfig(
        embed_dim=1024, context_length=256, width=2048, depth=24, heads=32, activation_checkpointing=True
    )
    return TrainConfig(
        stage="prior",
        recipe="paper",
        run=shared.run_folder("paper", "prior"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=PriorObjectiveConfig(stage=stage(model)),
        optimizer=OptimizerConfig(
            learning_rate=1.1e-4, beta2=0.96, eps=1e-6, weight_decay=6e-2, ema_decay=0.9999, ema_warmup=False
        ),
        zero=ZeroConfig(stage=2, precision="bf16"),
        loop=LoopConfig(max_steps=600_000, global_batch_size=4096, microbatch_size=64),
        resources=ResourcesConfig(num_workers=64, use_gpu="yes", data_cpus=128),
    )


RECIPES = {"demo": demo, "debug": debug, "small": small, "paper": paper}
