"""diffusers' prior, decoder and upsampler of a bundle's shapes, in the loop of its unCLIP pipeline.

Weights are random: its modules have no patches, no learned dropping, and another text encoder, so a bundle's do not fit all
of them; shapes, rows and steps are the same, and so is the time. A network on patches gets pictures of patches as channels.
What is left to its advantage: captions are encoded already, and nothing is converted to 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel

from unclip.diffusion.samplers import SamplingConfig
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig
from unclip.pipelines.cascade import Cascade
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import PriorStage


class DiffusersLoop:
    """One request at a time through all steps of its stages."""

    def __init__(self, pipeline: Pipeline) -> None:
        assert isinstance(pipeline.prior, PriorStage)
        self._draws = pipeline.prior.config.num_draws
        self._prior_shape = pipeline.prior.config.model
        self._decoder_shape = pipeline.decoder.config.model
        self._prior = _frozen(_prior(self._prior_shape))
        self._decoder = _frozen(_decoder(self._decoder_shape))
        self._upsamplers = {
            name: (_frozen(_upsampler(stage.config.model.unet)), stage.config.model.unet)
            for name, stage in pipeline.upsamplers.items()
        }

    @torch.no_grad()
    def __call__(self, cascade: Cascade) -> None:
        """As many steps, guided or not, as `cascade` says."""
        self._sample_prior(_sampling(cascade, "prior"))
        self._sample_decoder(_sampling(cascade, "decoder"))
        for name, (network, shape) in self._upsamplers.items():
            if name in cascade.sampling:
                self._sample_upsampler(network, shape, _sampling(cascade, name))

    def _sample_prior(self, sampling: SamplingConfig) -> None:
        shape = self._prior_shape
        rows = self._draws * (2 if sampling.guidance_scale != 1 else 1)
        text, states = torch.randn(rows, shape.embed_dim), torch.randn(rows, shape.context_length, shape.embed_dim)
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        x = torch.randn(self._draws, shape.embed_dim)
        scheduler: Any = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        )
        for t, previous in _pairs(scheduler, sampling):
            doubled = x.repeat(rows // self._draws, 1)
            output = self._prior(doubled, t, text, states, attention_mask=mask).predicted_image_embedding
            x = scheduler.step(_combined(output, sampling), t, x, prev_timestep=previous).prev_sample

    def _sample_decoder(self, sampling: SamplingConfig) -> None:
        shape, unet = self._decoder_shape, self._decoder_shape.unet
        rows = 2 if sampling.guidance_scale != 1 else 1
        length = (shape.context_length or 0) + shape.num_image_tokens
        states, embedding = torch.randn(rows, length, shape.context_dim or 1), torch.randn(rows, unet.embedding_dim)
        x = _noise(unet, unet.in_channels)
        scheduler: Any = UnCLIPScheduler(variance_type="learned_range", prediction_type="sample", clip_sample_range=1.0)
        for t, previous in _pairs(scheduler, sampling):
            output = self._decoder(x.repeat(rows, 1, 1, 1), t, states, class_labels=embedding).sample
            prediction, variance = output.split(x.shape[1], dim=1)
            output = torch.cat([_combined(prediction, sampling), variance[: len(x)]], dim=1)
            x = scheduler.step(output, t, x, prev_timestep=previous).prev_sample

    def _sample_upsampler(self, network: Any, shape: UNetConfig, sampling: SamplingConfig) -> None:
        x = _noise(shape, 3)
        low_res = torch.randn_like(x)
        scheduler: Any = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="epsilon", clip_sample_range=1.0
        )
        for t, previous in _pairs(scheduler, sampling):
            output = network(torch.cat([x, low_res], dim=1), t).sample
            x = scheduler.step(output, t, x, prev_timestep=previous).prev_sample


def _pairs(scheduler: Any, sampling: SamplingConfig) -> list[tuple[Any, Any]]:
    """The pipeline's own timesteps, each with the one that follows."""
    scheduler.set_timesteps(sampling.num_inference_steps)
    steps = list(scheduler.timesteps)
    return list(zip(steps, [*(int(step) for step in steps[1:]), None], strict=True))


def _sampling(cascade: Cascade, name: Any) -> SamplingConfig:
    sampling = cascade.sampling[name]
    assert isinstance(sampling, SamplingConfig)
    return sampling


def _combined(output: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    if sampling.guidance_scale == 1:
        return output
    without, conditional = output.chunk(2)
    return without + sampling.guidance_scale * (conditional - without)


def _noise(unet: UNetConfig, channels: int) -> torch.Tensor:
    """One picture, its patches as channels."""
    side = unet.image_size // unet.patch_size
    return torch.randn(1, channels * unet.patch_size**2, side, side)


def _frozen(network: Any) -> Any:
    return network.eval().requires_grad_(False)


def _unet(unet: UNetConfig) -> dict[str, Any]:
    pixels = unet.patch_size**2
    return {
        "in_channels": unet.in_channels * pixels,
        "out_channels": unet.out_channels * pixels,
        "block_out_channels": tuple(unet.channels * mult for mult in unet.channel_mult),
        "layers_per_block": unet.depth,
        "norm_num_groups": min(32, unet.channels // 4),
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift_norm else "default",
    }


def _decoder(config: DecoderConfig) -> Any:
    unet, side = config.unet, config.unet.image_size // config.unet.patch_size
    attends = [side // 2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    down = ["SimpleCrossAttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]
    up = ["SimpleCrossAttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)]
    return UNet2DConditionModel(
        **_unet(unet),
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple(up),
        cross_attention_dim=config.context_dim,
        attention_head_dim=unet.head_channels,
        class_embed_type="identity",
    )


def _upsampler(unet: UNetConfig) -> Any:
    levels = len(unet.channel_mult)
    return UNet2DModel(
        **_unet(unet),
        down_block_types=("ResnetDownsampleBlock2D",) * levels,
        up_block_types=("ResnetUpsampleBlock2D",) * levels,
        add_attention=False,
    )


def _prior(config: PriorConfig) -> Any:
    return PriorTransformer(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        num_layers=config.depth,
        embedding_dim=config.embed_dim,
        num_embeddings=config.context_length,
    )
