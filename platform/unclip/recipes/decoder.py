"""Recipes of the `decoder`."""

from __future__ import annotations

from unclip.config.resources import ResourcesConfig
from unclip.data.openmoji_captions import COLOURS, NO_ATTRIBUTE
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.models.decoder import DecoderConfig
from unclip.models.normalizer import paper_scale
from unclip.models.text import TextTransformerConfig
from unclip.models.unet import UNetConfig
from unclip.pipelines.stages import DecoderStageConfig
from unclip.recipes import shared
from unclip.training.config import LoopConfig, TrainConfig, TrainDataConfig
from unclip.training.engine import ZeroConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.optim import OptimizerConfig


def stage(model: DecoderConfig, sampling: SamplingConfig, **process: str) -> DecoderStageConfig:
    """The paper's process (Table 3): 1000 cosine steps, noise predicted, variance learned; `process` changes it."""
    return DecoderStageConfig.from_dict(
        {
            "model": model.to_dict(),
            "diffusion": DiffusionConfig(variance_type="learned_range", clip_sample_range=1.0).to_dict() | process,
            "sampling": sampling.to_dict(),
            "image_size": model.unet.image_size,
        }
        | ({} if model.embed_dim is None else {"normalizer": paper_scale(model.embed_dim).to_dict()})
        | ({} if model.num_classes is None else {"label_column": "label", "classes": _numbers(model.num_classes)})
    )


def _numbers(count: int) -> tuple[str, ...]:
    """Classes that the data counts instead of naming them."""
    return tuple(map(str, range(count)))


def _debug_unet() -> UNetConfig:
    return UNetConfig(
        out_channels=6,
        channels=16,
        channel_mult=(1, 2),
        depth=1,
        attention_resolutions=(8,),
        head_channels=16,
        patch_size=4,
        image_size=64,
    )


def _debug_text() -> TextTransformerConfig:
    return TextTransformerConfig(context_length=16, width=16, depth=1, heads=2)


def debug() -> TrainConfig:
    model = DecoderConfig(unet=_debug_unet(), text=_debug_text(), embed_dim=16)
    return TrainConfig(
        stage="decoder",
        recipe="debug",
        run=shared.run_folder("debug", "decoder"),
        bundle=shared.bundle("debug"),
        clip=f"{shared.bundle('debug')}/clip",
        data=TrainDataConfig(path=shared.openmoji(64, embedded=True), shuffle_rows=256),
        objective=DecoderObjectiveConfig(stage=stage(model, SamplingConfig(num_inference_steps=4, guidance_scale=2.0))),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def demo() -> TrainConfig:
    """Departs from the paper in what is predicted, the picture instead of the noise, and in the schedule, linear.

    In a thousand steps instead of a million, a small net that predicts the noise, or the velocity, leaves much of it in the
    picture; one that predicts the picture is blurred instead, with colours and outlines that can be made out. The linear
    schedule spends more of the timesteps where the noise is high, which is where shapes are decided.
    """
    model = DecoderConfig(
        unet=UNetConfig(
            out_channels=6,
            channels=64,
            channel_mult=(1, 2, 2),
            depth=1,
            attention_resolutions=(8, 4),
            head_channels=32,
            patch_size=4,
            image_size=64,
        ),
        text=TextTransformerConfig(context_length=24, width=64, depth=1, heads=2),
        embed_dim=128,
    )
    sampling = SamplingConfig(sampler="dpmsolver++", num_inference_steps=15, guidance_scale=1.5)
    return TrainConfig(
        stage="decoder",
        recipe="demo",
        run=shared.run_folder("demo", "decoder"),
        bundle=shared.bundle("demo"),
        clip=f"{shared.bundle('demo')}/clip",
        data=TrainDataConfig(path=shared.openmoji(64, embedded=True), shuffle_rows=4096),
        objective=DecoderObjectiveConfig(
            stage=stage(model, sampling, prediction_type="sample", beta_schedule="linear"), normalization="whiten"
        ),
        optimizer=shared.demo_optimizer(4e-3),
        zero=shared.AUTOCAST,
        loop=shared.demo_loop(batch=16, time_limit_s=270.0),
    )


def small() -> TrainConfig:
    """ADM's ImageNet-64 shape (Dhariwal and Nichol 2021, Table 11) with a text encoder of GLIDE's released size."""
    model = DecoderConfig(
        unet=UNetConfig(
            out_channels=6,
            channels=192,
            channel_mult=(1, 2, 3, 4),
            depth=3,
            attention_resolutions=(32, 16, 8),
            dropout=0.1,
            image_size=64,
        ),
        text=TextTransformerConfig(context_length=77, width=512, depth=12, heads=8),
        embed_dim=768,
    )
    return TrainConfig(
        stage="decoder",
        recipe="small",
        run=shared.run_folder("small", "decoder"),
        bundle=shared.bundle("small"),
        data=TrainDataConfig(path=""),
        objective=DecoderObjectiveConfig(
            stage=stage(model, SamplingConfig(num_inference_steps=250, guidance_scale=3.0))
        ),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, grad_clip=1.0, warmup_steps=1000),
        zero=shared.BF16,
        loop=LoopConfig(max_steps=400_000, global_batch_size=512, microbatch_size=128, time_limit_s=12 * shared.HOURS),
        resources=ResourcesConfig(use_gpu="yes", data_cpus=12),
    )


def paper() -> TrainConfig:
    """Table 3: the 3.5B GLIDE model with z_i; batch 2048, 800K steps, learning rate 1.2e-4, 250 steps, learned variance.

    Guidance 1.25 is that of the paper's best FID (§5.4). The paper gives neither warm-up nor clipping.
    """
    model = DecoderConfig(
        unet=UNetConfig(
            out_channels=6,
            channels=512,
            channel_mult=(1, 2, 3, 4),
            depth=3,
            attention_resolutions=(32, 16, 8),
            head_channels=64,
            dropout=0.1,
            image_size=64,
            activation_checkpointing=True,
        ),
        text=TextTransformerConfig(context_length=256, width=2048, depth=24, heads=32, activation_checkpointing=True),
        embed_dim=1024,
    )
    sampling = SamplingConfig(sampler="ddpm", num_inference_steps=250, guidance_scale=1.25)
    return TrainConfig(
        stage="decoder",
        recipe="paper",
        run=shared.run_folder("paper", "decoder"),
        bundle=shared.bundle("paper"),
        data=TrainDataConfig(path=""),
        objective=DecoderObjectiveConfig(stage=stage(model, sampling)),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, ema_decay=0.9999, ema_warmup=False),
        zero=ZeroConfig(stage=2, precision="bf16"),
        loop=LoopConfig(max_steps=800_000, global_batch_size=2048, microbatch_size=8),
        resources=ResourcesConfig(num_workers=256, use_gpu="yes", data_cpus=512),
    )


def glide() -> TrainConfig:
    """GLIDE's base model (Nichol et al. 2021, section 4): caption alone, batch 2048, 2.5M steps.

    A fifth of the captions are dropped from the start; the paper does that in a fine-tuning of its own (section 4.2),
    and gives no learning rate: that of unCLIP's decoder, which is this model with z_i. Guidance 3 is what people chose.
    """
    model = DecoderConfig(
        unet=UNetConfig(
            out_channels=6,
            channels=512,
            channel_mult=(1, 2, 3, 4),
            depth=3,
            attention_resolutions=(32, 16, 8),
            dropout=0.1,
            image_size=64,
            activation_checkpointing=True,
        ),
        text=TextTransformerConfig(context_length=128, width=2048, depth=24, heads=32, activation_checkpointing=True),
    )
    sampling = SamplingConfig(sampler="ddpm", num_inference_steps=150, guidance_scale=3.0)
    return TrainConfig(
        stage="decoder",
        recipe="glide",
        run=shared.run_folder("glide", "decoder"),
        bundle=shared.bundle("glide"),
        data=TrainDataConfig(path=""),
        objective=DecoderObjectiveConfig(stage=stage(model, sampling), text_drop_prob=0.2),
        optimizer=OptimizerConfig(learning_rate=1.2e-4, ema_decay=0.9999, ema_warmup=False),
        zero=ZeroConfig(stage=2, precision="bf16"),
        loop=LoopConfig(max_steps=2_500_000, global_batch_size=2048, microbatch_size=8),
        resources=ResourcesConfig(num_workers=256, use_gpu="yes", data_cpus=512),
    )


def glide_debug() -> TrainConfig:
    """GLIDE's inputs at the size of `debug`, in a bundle of its own: a cascade has one decoder."""
    model = DecoderConfig(unet=_debug_unet(), text=_debug_text())
    return TrainConfig(
        stage="decoder",
        recipe="glide_debug",
        run=shared.run_folder("glide_debug", "decoder"),
        bundle=shared.bundle("glide_debug"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=256),
        objective=DecoderObjectiveConfig(
            stage=stage(model, SamplingConfig(num_inference_steps=4, guidance_scale=2.0)), text_drop_prob=0.2
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


def adm() -> TrainConfig:
    """ADM's class-conditional ImageNet-64 (Dhariwal and Nichol 2021, Table 11): 296M, batch 2048, 540K steps, rate 3e-4.

    A tenth of the classes are dropped, so that it can be guided without a classifier as well (Ho and Salimans 2022).
    """
    model = DecoderConfig(
        unet=UNetConfig(
            out_channels=6,
            channels=192,
            channel_mult=(1, 2, 3, 4),
            depth=3,
            attention_resolutions=(32, 16, 8),
            dropout=0.1,
            image_size=64,
        ),
        num_classes=1000,
    )
    return TrainConfig(
        stage="decoder",
        recipe="adm",
        run=shared.run_folder("adm", "decoder"),
        bundle=shared.bundle("adm"),
        data=TrainDataConfig(path=""),
        objective=DecoderObjectiveConfig(stage=stage(model, SamplingConfig(num_inference_steps=250))),
        optimizer=OptimizerConfig(learning_rate=3e-4, ema_decay=0.9999, ema_warmup=False),
        zero=ZeroConfig(stage=1, precision="bf16"),
        loop=LoopConfig(max_steps=540_000, global_batch_size=2048, microbatch_size=64),
        resources=ResourcesConfig(num_workers=32, use_gpu="yes", data_cpus=128),
    )


def adm_debug() -> TrainConfig:
    """ADM's inputs at the size of `debug`: the classes are OpenMoji's colours."""
    classes = (*COLOURS, NO_ATTRIBUTE)
    model = DecoderConfig(unet=_debug_unet(), num_classes=len(classes))
    sampling = SamplingConfig(num_inference_steps=4, guidance_scale=2.0)
    return TrainConfig(
        stage="decoder",
        recipe="adm_debug",
        run=shared.run_folder("adm_debug", "decoder"),
        bundle=shared.bundle("adm_debug"),
        data=TrainDataConfig(path=shared.openmoji(64), shuffle_rows=256),
        objective=DecoderObjectiveConfig(
            stage=stage(model, sampling).merged({"label_column": "colour", "classes": classes})
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        zero=shared.FP32,
        loop=shared.debug_loop(),
    )


RECIPES = {
    "demo": demo,
    "debug": debug,
    "small": small,
    "paper": paper,
    "glide": glide,
    "glide_debug": glide_debug,
    "adm": adm,
    "adm_debug": adm_debug,
}
