"""What the recipes of one size have in common, whatever the stage."""

from __future__ import annotations

from unclip.pipelines.stages import StageName
from unclip.training.config import LoopConfig
from unclip.training.engine import ZeroConfig
from unclip.training.optim import OptimizerConfig

OPENMOJI = "data/openmoji"
"""Where jobs/prepare_openmoji.py writes, with a folder for each picture size and split."""

HOURS = 3600.0


def run_folder(recipe: str, stage: StageName) -> str:
    return f"runs/{recipe}/{stage}"


def bundle(recipe: str) -> str:
    return f"runs/{recipe}/bundle"


def openmoji(size: int, *, embedded: bool = False) -> str:
    """The training split of OpenMoji at `size` pixels, as rendered or with CLIP embeddings beside."""
    return f"{OPENMOJI}/{size}-clip/train" if embedded else f"{OPENMOJI}/{size}/train"


def debug_loop() -> LoopConfig:
    """Two steps of two micro-batches, saved after each."""
    return LoopConfig(
        max_steps=2, global_batch_size=4, microbatch_size=2, log_every=1, checkpoint_every_s=0.0, keep_checkpoints=1
    )


def demo_loop(*, batch: int, time_limit_s: float, microbatch: int | None = None) -> LoopConfig:
    """Ends by the clock; a checkpoint every half minute keeps what a killed worker loses small."""
    return LoopConfig(
        max_steps=1_000_000,
        global_batch_size=batch,
        microbatch_size=microbatch or batch,
        time_limit_s=time_limit_s,
        log_every=5,
        checkpoint_every_s=30.0,
        keep_checkpoints=1,
    )


def demo_optimizer(learning_rate: float, *, ema_decay: float = 0.99, weight_decay: float = 0.0) -> OptimizerConfig:
    """For hundreds of steps, not hundreds of thousands: a high rate that falls to zero, and a short average."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        beta2=0.99,
        weight_decay=weight_decay,
        grad_clip=1.0,
        ema_decay=ema_decay,
        lr_schedule="cosine",
        warmup_steps=20,
    )


FP32 = ZeroConfig(stage=1, precision="fp32")
AUTOCAST = ZeroConfig(stage=1, precision="autocast")
"""For CPUs: with bf16 instructions twice as fast as fp32."""
BF16 = ZeroConfig(stage=1, precision="bf16")
"""For GPUs: half the memory and traffic of weights and gradients."""
